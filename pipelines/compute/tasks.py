"""Functions over many items as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# Calls a function on every number of a range, somewhere on the cluster, and returns when all are done.
ForEach = Callable[[Callable[[dict[str, Any]], dict[str, Any]], Sequence[int]], Iterable[Any]]


def chunks(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _for_each(function: Callable[[dict[str, Any]], dict[str, Any]], items: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Call a function on every item: here where there is one, else as tasks of Ray Data."""
    if len(items) <= 1:
        yield from (function({"item": item}) for item in items)
        return
    import ray.data

    yield from ray.data.from_items(list(items), override_num_blocks=len(items)).map(function, num_cpus=1).iter_rows()
