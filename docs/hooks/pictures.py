"""What GitHub draws of a text and a site without scripts cannot: equations and the graph of the rooms."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter

from latex2mathml.converter import convert
from relinking import outside_code

WIDTH, ROW, BOX = 760, 70, 26


def drawn(markdown: str) -> str:
    """Markdown with its blocks ``math`` and ``mermaid`` and its $`equations`$ drawn."""
    markdown = re.sub(r"^```math\n(.*?)\n```$", lambda found: block(found[1]), markdown, flags=re.M | re.S)
    markdown = re.sub(r"^```mermaid\n(.*?)\n```$", lambda found: rooms(found[1]), markdown, flags=re.M | re.S)
    return outside_code(markdown, lambda text: re.sub(r"\$`(.+?)`\$", lambda found: inline(found[1]), text))


def inline(latex: str) -> str:
    """An equation in a line of text; Markdown takes a line that begins with ``<math>`` out of its paragraph."""
    return f"<span>{convert(latex)}</span>"


def block(latex: str) -> str:
    """An equation of its own line."""
    return "\n" + convert(" ".join(latex.split()), display="block") + "\n"


def rooms(mermaid: str) -> str:
    """A graph of arrows ``a --> b`` in layers, whoever imports above whom it imports."""
    arrows = re.findall(r"(\w+) --> (\w+)", mermaid)
    below: dict[str, set[str]] = {name: set() for arrow in arrows for name in arrow}
    for above, name in arrows:
        below[above].add(name)
    height: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():
        height[name] = max((height[each] + 1 for each in below[name]), default=0)
    layers = [[name for name in below if height[name] == level] for level in range(max(height.values()), -1, -1)]
    places = _placed(layers, arrows)
    lines = []
    for above, name in arrows:
        (x1, y1), (x2, y2) = places[above], places[name]
        start, end = y1 + BOX / 2, y2 - BOX / 2 - 7
        bend = (start + end) / 2
        curve = f"M{x1:.0f} {start:.0f}C{x1:.0f} {bend:.0f} {x2:.0f} {bend:.0f} {x2:.0f} {end:.0f}"
        lines.append(f'<path d="{curve}" marker-end="url(#to)"/>')
    for name, (x, y) in places.items():
        half = len(name) * 4 + 10
        lines.append(f'<rect x="{x - half:.0f}" y="{y - BOX / 2:.0f}" width="{2 * half}" height="{BOX}" rx="6"/>')
        lines.append(f'<text x="{x:.0f}" y="{y + 4:.0f}">{name}</text>')
    marker = 'id="to" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    head = f'<marker {marker}><path d="M0 0L8 4L0 8z"/></marker>'
    size = f'viewBox="0 0 {WIDTH} {ROW * len(layers)}"'
    told = "Rooms of the package; an arrow leads from a room to one that it imports"
    return f'\n<div class="rooms"><svg {size} role="img" aria-label="{told}"><defs>{head}</defs>{"".join(lines)}</svg></div>\n'


def _placed(layers: list[list[str]], arrows: list[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Places of all names: each layer in the order of the mean place of whom it is tied to, which keeps lines short."""
    tied: dict[str, list[str]] = {name: [] for layer in layers for name in layer}
    for above, below in arrows:
        tied[above].append(below)
        tied[below].append(above)
    across = {name: (place + 0.5) / len(layer) for layer in layers for place, name in enumerate(layer)}
    for _ in range(30):
        for layer in layers:
            layer.sort(key=lambda name: sum(across[each] for each in tied[name]) / max(1, len(tied[name])))
            across |= {name: (place + 0.5) / len(layer) for place, name in enumerate(layer)}
    return {name: (across[name] * WIDTH, ROW * (level + 0.5)) for level, layer in enumerate(layers) for name in layer}
