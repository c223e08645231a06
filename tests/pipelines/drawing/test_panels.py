"""Charts side by side as one picture."""

import numpy as np

from pipelines.drawing.charts import ACCENT
from pipelines.drawing.grids import Image8
from pipelines.drawing.panels import PANEL_PIXELS, Panel, draw_panels

BLUE = tuple(int(ACCENT[i : i + 2], 16) for i in (1, 3, 5))


def blue(picture: Image8) -> np.ndarray:
    return (picture == BLUE).all(axis=-1)


def test_the_bars_of_a_histogram_are_as_high_as_their_counts() -> None:
    picture = draw_panels("title", [Panel("", [1, 0, 4], edges=[0, 1, 2, 3])], columns=1, width=400)
    heights = blue(picture).sum(axis=0)
    left, right = heights[:200].max(), heights[200:].max()
    assert abs(right / left - 4) < 0.2
    assert picture.shape[1:] == (400, 3)


def test_named_bars_lie_in_their_order() -> None:
    picture = draw_panels("title", [Panel("", [10, 40], labels=["latent", "tar"])], columns=1, width=400)
    lengths = blue(picture).sum(axis=1)
    middle = (np.flatnonzero(lengths)[0] + np.flatnonzero(lengths)[-1]) // 2
    assert lengths[:middle].max() < lengths[middle:].max() / 3


def test_panels_stand_in_rows() -> None:
    panels = [Panel(str(number), [1], edges=[0, 1]) for number in range(5)]
    two, three = (draw_panels("one line", panels, columns=columns, width=600) for columns in (2, 3))
    assert two.shape[0] - three.shape[0] == PANEL_PIXELS
