"use strict";
// A pointer near a point of a plot is told what it is; a row's button hides it in the plots and tables of its section.
const told = document.getElementById("told");
const hiddenRows = (place) => new Set([...(place.closest(".plots")?.querySelectorAll('button[aria-pressed="false"]') ?? [])]
  .map((button) => Number(button.dataset.row)));

for (const picture of document.querySelectorAll(".picture")) {
  const points = JSON.parse(picture.dataset.points);
  const svg = picture.querySelector("svg");
  const dot = document.createElementNS(svg.namespaceURI, "circle");
  dot.setAttribute("r", 5);
  dot.setAttribute("style", "fill: none; stroke: currentColor; stroke-width: 1.5; display: none");
  svg.append(dot);
  picture.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const hidden = hiddenRows(picture);
    let nearest = null, least = 24;
    for (const point of points) {
      const distance = Math.hypot(point[0] - at.x, point[1] - at.y);
      if (distance < least && !hidden.has(point[2])) [nearest, least] = [point, distance];
    }
    dot.style.display = nearest ? "" : "none";
    told.hidden = !nearest;
    if (!nearest) return;
    dot.setAttribute("cx", nearest[0]);
    dot.setAttribute("cy", nearest[1]);
    told.textContent = nearest[3];
    told.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - told.offsetWidth - 4))}px`;
    told.style.top = `${Math.max(4, event.clientY - told.offsetHeight - 10)}px`;
  });
  picture.addEventListener("pointerleave", () => { told.hidden = true; dot.style.display = "none"; });
}

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const part of button.closest(".plots").querySelectorAll(`svg [data-row="${button.dataset.row}"]`)) {
      part.classList.toggle("hidden", !shown);
    }
    for (const line of button.closest("section").querySelectorAll("tr[data-name]")) {
      if (line.dataset.name === button.dataset.name) line.classList.toggle("hidden", !shown);
    }
  });
}
