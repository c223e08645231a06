"""One function over many items: plain values in, plain values out, in the order of the items."""

import time
from typing import Any

from pipelines.compute.tasks import chunks, for_each


def test_results_of_tasks_come_in_the_order_of_the_items(ray_cluster: None) -> None:
    def describe(item: int) -> dict[str, Any]:
        # The first ones finish last.
        time.sleep(0.3 * (item < 2))
        return {"item": item, "nested": [{"square": item * item}, None, "text"]}

    assert list(for_each(describe, range(5))) == [describe(item) for item in range(5)]


def test_tasks_without_a_result_are_fine(ray_cluster: None) -> None:
    def nothing(item: int) -> None:
        return None

    assert list(for_each(nothing, [7, 3])) == [None, None]


def test_a_single_item_needs_no_cluster() -> None:
    here: list[int] = []
    assert list(for_each(here.append, [4])) == [None]
    assert here == [4]
    assert list(for_each(here.append, [])) == []


def test_chunks_cover_everything_once() -> None:
    assert [list(chunk) for chunk in chunks(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
