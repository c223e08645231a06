"""Charts as inline SVG: they scale, print, and take their colours from the page's style sheet."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

MOST_POINTS, MOST_LABELS = 500, 9
LEAST_LOG_RATIO = 4  # below it, a logarithmic axis has hardly a round value to show


@dataclass(frozen=True)
class Frame:
    """A drawing's size in pixels, and the lines between which its values lie."""

    width: int
    height: int

    @property
    def left(self) -> int:
        return 60

    @property
    def right(self) -> int:
        return self.width - 14

    @property
    def top(self) -> int:
        return 10

    @property
    def bottom(self) -> int:
        return self.height - 42


WIDE, NARROW = Frame(880, 260), Frame(420, 230)


@dataclass(frozen=True)
class Axis:
    """A range of values laid over a range of pixels, linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Round values inside the range: 1, 2, 5 times a power of ten."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            candidates = [mantissa * 10.0**decade for decade in decades for mantissa in (1, 2, 5)]
            if len(decades) > count:
                candidates = [10.0**decade for decade in decades]
        else:
            step = _round_up((self.high - self.low) / count)
            first = math.ceil(self.low / step)
            candidates = [index * step for index in range(first, math.floor(self.high / step) + 1)]
        return [value for value in candidates if self.low <= value <= self.high]


def loss_chart(steps: Sequence[float], losses: Sequence[float]) -> Markup:
    """A loss over optimiser steps: each logged value, and the mean over a twentieth of the run around it.

    The vertical axis is logarithmic where the losses are positive and span enough. Not finite ones are left out.
    """
    points = [(x, y) for x, y in zip(steps, losses) if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    smooth = running_mean(ys, reach=max(1, len(ys) // 40))
    log = 0 < min(ys) < max(ys) / LEAST_LOG_RATIO
    x_axis = Axis(min(xs), max(max(xs), min(xs) + 1), WIDE.left, WIDE.right)
    y_axis = Axis(*_margin(min(ys), max(ys), log=log), WIDE.bottom, WIDE.top, log=log)
    body = _rules(WIDE, y_axis, "loss (log scale)" if log else "loss") + _axis_label(WIDE, "step")
    for tick in x_axis.ticks(8):
        body += _text(x_axis.place(tick), WIDE.bottom + 16, _number(tick), "middle")
    body += _line("raw", xs, ys, x_axis, y_axis) + _line("smooth", xs, smooth, x_axis, y_axis)
    return _svg(WIDE, f"Loss from {ys[0]:.3g} to {smooth[-1]:.3g} over {len(ys)} logged steps", body)


def histogram(edges: Sequence[float], counts: Sequence[int], label: str) -> Markup:
    """Bars of one width; bar i counts values from edges[i] up to edges[i + 1], the last one all from its edge on.

    Empty bars at both ends are left out.
    """
    filled = [index for index, count in enumerate(counts) if count]
    if not filled:
        return Markup("")
    shown = range(filled[0], filled[-1] + 1)
    x_axis = Axis(0, len(shown), NARROW.left, NARROW.right)
    y_axis = Axis(0, max(counts) * 1.05, NARROW.bottom, NARROW.top)
    body = _rules(NARROW, y_axis, "samples") + _axis_label(NARROW, label)
    for position, index in enumerate(shown):
        left, right, top = x_axis.place(position), x_axis.place(position + 1), y_axis.place(counts[index])
        after = f"{edges[index + 1]:g}" if index + 1 < len(edges) else "and more"
        title = f"{edges[index]:g} to {after}: {counts[index]:,}"
        body += Markup(
            '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2"><title>{}</title></rect>'
        ).format(left + 1, top, right - left - 2, NARROW.bottom - top, title)
    for index in range(shown.start, shown.stop + 1, math.ceil(len(shown) / MOST_LABELS)):
        if index < len(edges):
            place = x_axis.place(index - shown.start)
            body += _text(place, NARROW.bottom + 16, f"{edges[index]:g}", "middle")
    return _svg(NARROW, f"Histogram of {label}", body)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and up to `reach` values on either side, as many on the one as on the other."""
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for index in range(len(values)):
        # Fewer near the ends: a window to one side only would lag behind a falling loss.
        side = min(reach, index, len(values) - 1 - index)
        means.append((sums[index + side + 1] - sums[index - side]) / (2 * side + 1))
    return means


def _svg(frame: Frame, title: str, body: Markup) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>{}</svg>').format(
        frame.width, frame.height, title, body
    )


def _rules(frame: Frame, y_axis: Axis, label: str) -> Markup:
    """Horizontal lines at round values, with the values, and what they are."""
    body = Markup("")
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        line = Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        body += line.format(frame.left, frame.right, y, y) + _text(frame.left - 7, y + 4, _number(tick), "end")
    middle = (frame.top + frame.bottom) / 2
    upright = Markup('<text transform="translate(12 {:.0f}) rotate(-90)" text-anchor="middle">{}</text>')
    return body + upright.format(middle, label)


def _axis_label(frame: Frame, text: str) -> Markup:
    return _text((frame.left + frame.right) / 2, frame.height - 7, text, "middle")


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _line(style: str, xs: Sequence[float], ys: Sequence[float], x_axis: Axis, y_axis: Axis) -> Markup:
    stride = math.ceil(len(xs) / MOST_POINTS)
    kept = [*range(0, len(xs) - 1, stride), len(xs) - 1]
    points = " ".join(f"{x_axis.place(xs[i]):.1f},{y_axis.place(ys[i]):.1f}" for i in kept)
    return Markup('<polyline class="{}" points="{}"/>').format(style, points)


def _margin(low: float, high: float, *, log: bool) -> tuple[float, float]:
    if log:
        factor = max((high / low) ** 0.04, 1.05)
        return low / factor, high * factor
    space = max((high - low) * 0.05, 1e-9)
    return low - space, high + space


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(mantissa * power for mantissa in (1, 2, 5, 10) if mantissa * power >= value * (1 - 1e-9))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
