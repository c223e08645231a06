"""Charts for the report, drawn by matplotlib as inline SVG that takes its colors and font from the page around it."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, ScalarFormatter, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray

from pipelines.drawing.printable import printable

# matplotlib is imported where a chart is drawn: stages declare their section of the report, and `ldm --help` and
# `ldm plan`, which load these declarations, need not wait half a second for it.
Floats = NDArray[np.float64]

WIDE, NARROW = (880, 260), (420, 230)  # width and height in pixels
PIXELS_PER_INCH = 72  # one unit of matplotlib's SVG is one point
MOST_POINTS = 1000  # of a line; more than one per pixel cannot be seen
MOST_BIN_LABELS = 9
ROUND = [1, 2, 5, 10]  # times a power of ten: steps from tick to tick
LEAST_LOG_RATIO = 4  # below it, a logarithmic axis has hardly a round value to show
LARGEST_VALUE = 1e100  # beyond it (float32 ends at 3.4e38), the arithmetic of the axes would overflow

# The light colors of the page's style sheet, and the variables that hold them: a chart follows the page into dark mode
# and print, and keeps these colors in a page without the variables.
ACCENT, FAINT, SOFT, LINE = "#2f6fde", "#b9cdf3", "#667085", "#e4e7ec"
VARIABLES = {ACCENT: "--accent", FAINT: "--faint", SOFT: "--soft", LINE: "--line"}

PARTS = ("raw", "smooth", "bar")  # classes of the parts of a chart

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": SOFT,
    "axes.labelsize": 12,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 12,
    "grid.color": LINE,
    "svg.fonttype": "none",  # text stays text: in the page's font, and searchable
    "svg.hashsalt": "ldm",  # or ids would differ from run to run
    "text.parse_math": False,
    "xtick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.left": False,
}


def loss_chart(steps: ArrayLike, losses: ArrayLike) -> Markup:
    """Draw a loss over optimizer steps: the logged values, and their mean over a twentieth of the run.

    The vertical axis is logarithmic if the losses are positive and span enough. Values that are not finite are left
    out; a long run is thinned, but keeps its spikes.

    Args:
        steps: (N,) the optimizer step of each value.
        losses: (N,) the values.

    Returns:
        An `<svg>` element; nothing for fewer than two finite values.
    """
    xs, ys = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    drawable = (np.abs(xs) < LARGEST_VALUE) & (np.abs(ys) < LARGEST_VALUE)  # False for NaN
    xs, ys = xs[drawable], ys[drawable]
    if len(xs) < 2:
        return Markup("")
    smooth = running_mean(ys, reach=max(1, len(ys) // 40))
    low, high = ys.min(), ys.max()
    log = 1 / LARGEST_VALUE < low * LEAST_LOG_RATIO < high
    with style():
        figure = _figure(WIDE)
        axes = figure.add_subplot(xlabel="step", ylabel="loss (log scale)" if log else "loss")
        axes.plot(*_thinned(xs, ys), color=FAINT, linewidth=1, gid="raw")
        axes.plot(*_thinned(xs, smooth), color=ACCENT, linewidth=2, gid="smooth")
        axes.margins(x=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=ROUND))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if log:
            axes.set_yscale("log")
            axes.minorticks_off()
            # Over several decades, 1, 2 and 5 of each would be a thicket.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=7))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
            # Without an offset in the corner ("+1.2e-1" above ticks that read 1, 2, 3).
            axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        return _svg(figure, f"Loss from {ys[0]:.3g} to {smooth[-1]:.3g} over {len(ys):,} logged steps")


def histogram(edges: Sequence[float], counts: Sequence[int], label: str) -> Markup:
    """Draw a histogram with bars of equal width, whatever the widths of its bins; each bar's tooltip says its count.

    Args:
        edges: (N,) or (N + 1,) ascending; bin i counts values from `edges[i]` up to `edges[i + 1]`, a last bin without
            an upper edge all values from its lower edge on.
        counts: (N,) values per bin; empty bins at both ends are left out.
        label: what is measured, below the horizontal axis.

    Returns:
        An `<svg>` element; nothing if all bins are empty.
    """
    filled = [index for index, count in enumerate(counts) if count]
    if not filled:
        return Markup("")
    bins = range(filled[0], filled[-1] + 1)
    upper = [f"{edges[i + 1]:g}" if i + 1 < len(edges) else "and more" for i in bins]
    tooltips = [f"{edges[i]:g} to {end}: {counts[i]:,}" for i, end in zip(bins, upper)]
    labelled = [i for i in range(bins.start, bins.stop + 1, math.ceil(len(bins) / MOST_BIN_LABELS)) if i < len(edges)]
    with style():
        figure = _figure(NARROW)
        axes = figure.add_subplot(xlabel=printable(label), ylabel="samples", xlim=(bins.start, bins.stop))
        for bar in axes.bar([i + 0.5 for i in bins], [counts[i] for i in bins], width=0.94, color=ACCENT):
            bar.set_gid("bar")
        axes.set_xticks(labelled, [f"{edges[i]:g}" for i in labelled])
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        return _svg(figure, f"Histogram of {printable(label)}", tooltips)


def running_mean(values: ArrayLike, reach: int) -> Floats:
    """Return the mean of each value and up to `reach` values on either side, equally many on both."""
    values = np.asarray(values, np.float64)
    index = np.arange(len(values))
    # Fewer near the ends: a window to one side only would lag behind a falling loss.
    side = np.minimum(np.minimum(index, index[::-1]), reach)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: Floats = (sums[index + side + 1] - sums[index - side]) / (2 * side + 1)
    return means


def _thinned(xs: Floats, ys: Floats) -> tuple[Floats, Floats]:
    """Keep both ends and, of each short stretch between them, the lowest and the highest value."""
    if len(xs) <= MOST_POINTS:
        return xs, ys
    stretches = np.array_split(np.arange(len(ys)), MOST_POINTS // 2 - 1)
    extremes = [stretch[extreme(ys[stretch])] for stretch in stretches for extreme in (np.argmin, np.argmax)]
    kept = np.unique([0, *extremes, len(ys) - 1])
    return xs[kept], ys[kept]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in our style, whatever matplotlibrc this machine has; the process's own settings come back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _figure(size: tuple[int, int]) -> Figure:
    # Not pyplot's, which keeps every figure alive and picks a backend for the screen.
    return Figure(figsize=(size[0] / PIXELS_PER_INCH, size[1] / PIXELS_PER_INCH), layout="constrained")


def _svg(figure: Figure, title: str, tooltips: Sequence[str] = ()) -> Markup:
    """Return the figure as an `<svg>` element for an HTML page; `tooltips` are its bars', from left to right."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = ElementTree.fromstring(file.getvalue())
    for element in svg.iter():
        _make_html(element)
    # In HTML, the style sheet of one drawing would hold for the whole page.
    svg[:] = [child for child in svg if child.tag != "metadata" and child.find("style") is None]
    svg.attrib = {"class": "chart", "role": "img", "viewBox": svg.attrib["viewBox"], "stroke-linejoin": "round"}
    _add_title(svg, title)
    for bar, tooltip in zip(svg.iterfind(".//g[@class='bar']"), tooltips):
        _add_title(bar, tooltip)
    return Markup(ElementTree.tostring(svg, encoding="unicode"))  # which escapes all text


def _add_title(element: ElementTree.Element, text: str) -> None:
    # A browser reads it out, or shows it as a tooltip, only if it is the first child.
    element.insert(0, ElementTree.Element("title"))
    element[0].text = text


def _make_html(element: ElementTree.Element) -> None:
    """Rewrite an element of matplotlib's SVG as one of an HTML page that may hold several charts."""
    # HTML knows SVG without namespaces, and `xlink:href` is plain `href` there.
    element.tag = element.tag.partition("}")[2]
    attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    if element.tag == "g" and (name := attributes.pop("id", "")) in PARTS:
        # Every chart has these groups, but an id may occur only once on a page. The ids of tick marks and clip paths
        # stay: they are digests of what they name, so that two charts share one only if it means the same in both.
        attributes["class"] = name
    if "style" in attributes:
        style = re.sub(r"font-family:[^;]*;? ?", "", attributes["style"])
        attributes["style"] = re.sub("#[0-9a-f]{6}", _variable, style)
    for name in attributes.keys() & {"d", "x", "y", "transform"}:
        attributes[name] = re.sub(r"-?\d+\.\d+", _rounded, " ".join(attributes[name].split()))
    element.attrib = attributes
    element.tail = None
    if element.tag != "text":
        element.text = None


def _variable(color: re.Match[str]) -> str:
    name = VARIABLES.get(color[0])
    return f"var({name}, {color[0]})" if name else color[0]


def _rounded(number: re.Match[str]) -> str:
    # Tenths of a pixel; matplotlib writes millionths, most of a long line's bytes.
    return f"{float(number[0]):.1f}".removesuffix(".0")
