"""Small bar charts side by side as one picture, for PNG files; the report's charts are in `charts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.drawing.charts import ACCENT, ROUND, style
from pipelines.drawing.grids import Image8
from pipelines.drawing.printable import printable

PANEL_PIXELS = 230
PIXELS_PER_INCH = 72
FONT_POINTS = 10


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: above it.
        counts: (N,) lengths of the bars.
        edges: (N + 1,) ascending edges of a histogram's bins.
        labels: (N,) names of the bars, in place of edges; they then lie, the first one on top, each with its count.
    """

    title: str
    counts: Sequence[float]
    edges: Sequence[float] = ()
    labels: Sequence[str] = ()


def draw_panels(title: str, panels: Sequence[Panel], *, columns: int, width: int) -> Image8:
    """Draw charts row by row below a title.

    Args:
        title: one line or several.
        panels: at least one.
        columns: charts in a row.
        width: of the picture, in pixels.

    Returns:
        (height, width, 3) uint8.
    """
    rows = -(-len(panels) // columns)
    heading = (title.count("\n") + 2) * FONT_POINTS * 2
    size = (width / PIXELS_PER_INCH, (rows * PANEL_PIXELS + heading) / PIXELS_PER_INCH)
    with style():
        figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout="constrained")
        figure.suptitle(_lines(title), fontsize=FONT_POINTS + 3, x=0.01, ha="left")
        for number, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, number)
            axes.set_title(printable(panel.title), fontsize=FONT_POINTS, loc="left")
            axes.tick_params(labelsize=FONT_POINTS - 1)
            if panel.labels:
                bars = axes.barh(range(len(panel.labels)), panel.counts, color=ACCENT)
                axes.bar_label(bars, [f"{count:,.0f}" for count in panel.counts], padding=3, fontsize=FONT_POINTS - 1)
                axes.set_yticks(range(len(panel.labels)), [printable(label) for label in panel.labels])
                axes.invert_yaxis()
                axes.grid(visible=False)
                axes.set_xticks([])
                axes.margins(x=0.2)
            else:
                widths = np.diff(panel.edges)
                axes.bar(panel.edges[:-1], panel.counts, 0.94 * widths, align="edge", color=ACCENT, linewidth=0)
                axes.margins(x=0)
                axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=ROUND))
                axes.xaxis.set_major_locator(
                    MaxNLocator(6, integer=all(float(edge).is_integer() for edge in panel.edges))
                )
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _lines(text: str) -> str:
    """Return text of several lines without what hides or reverses it."""
    return "\n".join(printable(line) for line in text.split("\n"))
