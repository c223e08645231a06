"""Charts as a browser would read them: the SVG parsed, its lines and bars measured."""

import itertools
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from markupsafe import Markup

from pipelines.drawing.charts import WIDE, histogram, loss_chart, running_mean

HOSTILE = '</title><script>alert("x")</script> & $\\frac{1}$ \x00\x1b[2J \u202e é'


def points(path: ElementTree.Element) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2]))


def line(svg: Markup, name: str) -> list[tuple[float, float]]:
    """Return the points of one line of a loss chart, `raw` or `smooth`; larger y is lower on the page."""
    (path,) = ElementTree.fromstring(svg).findall(f".//g[@class='{name}']/path")
    return points(path)


def texts(svg: Markup) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def numbers(svg: Markup) -> list[float]:
    """Return every tick of a chart, in order."""
    return [float(text.replace(",", "")) for text in texts(svg) if re.fullmatch(r"[\d,.e+-]+", text)]


def bars(svg: Markup) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(".//g[@class='bar']")


def height(bar: ElementTree.Element) -> float:
    (path,) = bar.iter("path")
    ys = [y for _, y in points(path)]
    return max(ys) - min(ys)


def test_a_loss_chart_falls_where_the_loss_falls_and_skips_what_is_not_finite() -> None:
    values = [1 / (step + 1) for step in range(100)]
    values[50], values[60], values[70] = math.nan, math.inf, -math.inf
    raw = line(loss_chart(range(100), values), "raw")
    assert len(raw) == 97
    assert all(after[0] > before[0] and after[1] >= before[1] for before, after in itertools.pairwise(raw))
    assert raw[0][1] < WIDE[1] / 4
    assert raw[-1][1] > WIDE[1] / 2


def test_a_long_loss_curve_is_thinned_and_keeps_its_ends_and_its_spikes() -> None:
    losses = np.full(500_000, 1.0)
    losses[123_456] = 3.0
    svg = loss_chart(range(500_000), losses)
    raw = line(svg, "raw")
    assert len(svg) < 100_000
    (highest,) = [point for point in raw if point[1] < raw[0][1]]
    left, right = raw[0][0], raw[-1][0]
    assert (highest[0] - left) / (right - left) == pytest.approx(123_456 / 500_000, abs=1e-3)
    assert right > WIDE[0] - 20


def test_only_losses_that_span_enough_get_a_logarithmic_axis() -> None:
    assert "loss (log scale)" in texts(loss_chart([0, 1], [1.0, 0.1]))
    for losses in ([1.0, 0.9], [1.0, -0.1], [1.0, 0.0]):
        assert "loss" in texts(loss_chart([0, 1], losses))


def test_ticks_are_round() -> None:
    assert numbers(loss_chart([0, 970], [1.2, 0.03])) == [0, 200, 400, 600, 800, 0.05, 0.1, 0.2, 0.5, 1]
    assert numbers(loss_chart([0, 970], [1e3, 1e-3]))[5:] == [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]
    assert "200,000" in texts(loss_chart([0, 1_000_000], [1.0, 0.1]))


@pytest.mark.parametrize("values", [[], [1.0], [math.nan] * 5, [math.nan, 1.0, math.inf]])
def test_too_few_losses_give_no_chart(values: list[float]) -> None:
    assert loss_chart(range(len(values)), values) == ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1.0, 1.0], [-1.0, 2.0], [1e-12, 1e12], [-1e99, 1e99], [1e-320, 1.0], [1e308, -1e308, 0, 1]]
)
def test_odd_losses_still_give_a_chart(values: list[float]) -> None:
    assert len(line(loss_chart(range(len(values)), values), "raw")) == 2


def test_a_chart_of_one_step_is_drawn() -> None:
    assert line(loss_chart([7, 7], [1.0, 2.0]), "raw")


def test_a_histogram_has_a_bar_for_each_bin_between_the_filled_ends() -> None:
    drawn = bars(histogram([0, 1, 2, 3, 4], [0, 2, 0, 5, 0], "words"))
    assert [bar.findtext("title") for bar in drawn] == ["1 to 2: 2", "2 to 3: 0", "3 to 4: 5"]
    heights = [height(bar) for bar in drawn]
    assert heights == pytest.approx([heights[2] * 2 / 5, 0, heights[2]], abs=0.2)


def test_the_last_bin_of_a_histogram_may_be_open() -> None:
    svg = histogram([0.5, 1, 1.5], [1, 1, 1234], "width / height")
    assert bars(svg)[-1].findtext("title") == "1.5 to and more: 1,234"
    assert [text for text in texts(svg) if "," not in text][:3] == ["0.5", "1", "1.5"]


@pytest.mark.parametrize(("edges", "counts"), [([], []), ([0, 1], [0, 0])])
def test_a_histogram_of_nothing_is_not_drawn(edges: list[float], counts: list[int]) -> None:
    assert histogram(edges, counts, "words") == ""


def test_a_hostile_label_is_shown_as_text() -> None:
    svg = histogram([0, 1], [1, 2], HOSTILE)
    assert "<script" not in svg
    shown = '</title><script>alert("x")</script> & $\\frac{1}$ \ufffd\ufffd[2J \ufffd é'
    assert shown in texts(svg)
    assert ElementTree.fromstring(svg).findtext("title") == f"Histogram of {shown}"


@pytest.mark.parametrize("svg", [loss_chart([0, 1, 2], [3, 2, 1]), histogram([0, 1], [1, 2], "words")])
def test_a_chart_follows_the_page_and_changes_nothing_outside_itself(svg: Markup) -> None:
    root = ElementTree.fromstring(svg)
    assert not [element.tag for element in root.iter() if element.tag in ("style", "script", "metadata", "image")]
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]
    references = [element.attrib["href"] for element in root.iter() if "href" in element.attrib]
    assert all(reference.startswith("#") for reference in references)
    assert "http" not in svg
    assert "font-family" not in svg
    colors = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg))
    assert all(color == "none" or color.startswith("var(--") for color in colors), colors


def test_the_same_values_give_the_same_bytes_whatever_matplotlibrc_says(tmp_path: Path) -> None:
    before = loss_chart([0, 1, 2], [3, 2, 1])
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linestyle: --\naxes.facecolor: red\n")
    with matplotlib.rc_context(fname=tmp_path / "matplotlibrc"):
        assert loss_chart([0, 1, 2], [3, 2, 1]) == before
        assert matplotlib.rcParams["font.size"] == 30, "what the process had set comes back"


def test_a_running_mean_keeps_the_ends_and_does_not_lag() -> None:
    assert running_mean([4, 0, 2, 1, 1], reach=1) == pytest.approx([4, 2, 1, 4 / 3, 1])
    assert running_mean(range(50), reach=7) == pytest.approx(list(range(50)))
