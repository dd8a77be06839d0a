"""Figures of matplotlib, as PNG files and as SVG in a page: a reader's theme colours it, a pointer finds its points.

None touches matplotlib's global state for longer than it draws.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that is too faint on white, and with a
# grey for their black that stands out on dark paper too. Their number shares no factor with the numbers of line styles and
# markers, so that no two rows look alike for a long time.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7f7f7f")
LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "<": "◀", ">": "▶", "p": "⬟", "h": "⬢"}
"""Matplotlib's markers, and the letters that look like them."""

# Stand for the colours of the page's theme, and look like ink and hairlines in a PNG file.
INK, HAIRLINE = "#1b1e21", "#d9dcdf"
_THEME = {INK: "currentColor", HAIRLINE: "var(--line)"}
_DOTS_PER_INCH = 110
_WIDTH = 6.4
# Room around the panels, in inches; a layout engine would draw every figure twice more to find it.
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.92, 0.15, 0.68, 0.12
_FONTS: Any = {"font.size": 9.5, "svg.fonttype": "none", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
          "xtick.color": INK, "ytick.color": INK, "grid.color": HAIRLINE, "grid.linewidth": 0.7}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A plot as it is written.

    Attributes:
        name: file name without its ending.
        title: heading on the page.
        caption: what it shows and how it was made; also its alternative text.
        png: a PNG file's bytes.
        svg: the element for a page, without the legend, which the page has for all its plots.
        points: of what a pointer finds: x and y in the SVG's units, number of the row (-1: of none), and what it is.
    """

    name: str
    title: str
    caption: str
    png: bytes
    svg: str
    points: tuple[tuple[float, float, int, str], ...]


@dataclass
class Canvas:
    """A figure under work.

    Attributes:
        figure: matplotlib's.
        axes: its panels, from above.
        lines: of each row, what stands for it in the legend.
        right: inches beside the panels for what stands there.
        name: file name without its ending; with title and caption it is given at the end.
    """

    figure: Figure
    axes: list[Axes]
    right: float = _RIGHT
    lines: dict[str, Any] = field(default_factory=dict)
    marks: list[tuple[Axes, float, float, int, str]] = field(default_factory=list)
    name: str = ""
    title: str = ""
    caption: str = ""

    @classmethod
    def new(cls, panels: int = 1, height: float = 3.9) -> Canvas:
        """An empty figure of as wide as a column of the page's grid."""
        with mpl.rc_context(_FONTS):
            figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, facecolor="white")
            axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(True)
            panel.set_axisbelow(True)
            panel.patch.set_visible(False)
        return cls(figure, axes)

    @classmethod
    def single(cls, across: str, up: str) -> tuple[Canvas, Axes]:
        """An empty figure of one panel, and the panel, whose axes are called so."""
        canvas = cls.new()
        (axes,) = canvas.axes
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        return canvas, axes

    def tell_bars(self, heights: Any, edges: Any, text: Callable[[float, float, float], str]) -> None:
        """Say what each bar of a histogram is: ``text`` of its left and right edge and its height."""
        for height, left, right in zip(heights, edges, edges[1:], strict=False):
            self.tell((left + right) / 2, height, -1, text(left, right, height))

    def tell(self, x: float, y: float, row: int, text: str, panel: int = 0) -> None:
        """Say what a point of a panel, in its data's units, is."""
        self.marks.append((self.axes[panel], float(x), float(y), row, text))

    def _lay_out(self, beside: float) -> None:
        """Leave so many inches beside the panels free for the legend of the rows."""
        width, height = _WIDTH + beside, self.figure.get_figheight()
        self.figure.set_figwidth(width)
        self.figure.subplots_adjust(
            _LEFT / width, _BOTTOM / height, 1 - (self.right + beside) / width, 1 - _TOP / height, hspace=0.38
        )

    def explain(self, axes: Axes, *handles_and_texts: Any, **keys: Any) -> None:
        """A legend of one panel, in the colours of the page."""
        with mpl.rc_context(_FONTS):
            axes.legend(*handles_and_texts, frameon=False, **keys)

    def called(self, name: str, title: str, caption: str) -> Canvas:
        """The canvas, with what it is called."""
        self.name, self.title, self.caption = name, title, caption
        return self

    def draw(self, group: int) -> Drawing:
        """The figure of a group of this number as PNG and as SVG; the same figure gives the same bytes."""
        name = f"{group}-{self.name}"
        with mpl.rc_context({**_FONTS, "svg.hashsalt": name}):
            picture, drawn = io.BytesIO(), io.StringIO()
            legend = None
            if len(self.lines) > 1:
                # The names are given, for those with a leading underscore would be left out if matplotlib collected them.
                names = [literal(row) for row in self.lines]
                corner: Any = {"loc": "upper right", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
                legend = self.figure.legend([*self.lines.values()], names, **corner)
            beside = 0.0 if legend is None else legend.get_window_extent().width / _DOTS_PER_INCH
            self._lay_out(beside)
            self.figure.savefig(picture, format="png", metadata={"Software": None})
            if legend is not None:
                legend.remove()
            self._lay_out(0.0)
            self.figure.patch.set_visible(False)
            self.figure.savefig(drawn, format="svg", metadata={"Date": None})
        height = self.figure.get_figheight() * 72
        points = []
        for axes, x, y, row, text in self.marks:
            pixels = axes.transData.transform((x, y))
            if axes.bbox.padded(1).contains(*pixels):
                across, up = pixels * 72 / self.figure.dpi
                points.append((round(float(across), 1), round(float(height - up), 1), row, text))
        svg = _element(drawn.getvalue(), f"g{name}")
        return Drawing(name, self.title, self.caption, picture.getvalue(), svg, tuple(points))


def _element(text: str, name: str) -> str:
    """The ``svg`` element of a file of matplotlib's, for a page that holds several and has a theme of its own."""
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    # The size is the page's; names of parts would occur in every plot, and those that are referred to carry the plot's.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    text = re.sub(r' id="row-(\d+)"', r' data-row="\1"', text)
    text = re.sub(r' id="[a-zA-Z0-9.]+_[\d_]+"', "", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, of_theme in _THEME.items():
        text = text.replace(colour, of_theme)
    return text.strip()


def style(rows: Sequence[str], row: str) -> dict[str, Any]:
    """Colour, line and marker of a row."""
    index, markers = rows.index(row), tuple(MARKERS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": markers[index % len(markers)],
    }


def keys_of(rows: Sequence[str]) -> tuple[tuple[str, str, str], ...]:
    """Name, colour and marker's letter of each row, for a legend in a page."""
    styles: list[Mapping[str, Any]] = [style(rows, row) for row in rows]
    return tuple((row, look["color"], MARKERS[look["marker"]]) for row, look in zip(rows, styles, strict=True))


def literal(text: str) -> str:
    """Text that matplotlib writes as it is: dollar signs would start mathematics."""
    return text.replace("$", r"\$")


def slug(text: str) -> str:
    """Text as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in text)
