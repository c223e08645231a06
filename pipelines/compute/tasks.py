"""One function over many items, as Ray tasks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pipelines.errors import UserError
from pipelines.patience import expect_answers

T = TypeVar("T")

# How often a task is run whose worker dies.
TRIES = 3

# `for_each`, or what stands in for it where there is no cluster: the built-in `map`.
ForEach = Callable[[Callable[[int], Any], Sequence[int]], Iterable[Any]]


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a sequence into pieces of `size` items; the last piece may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def for_each(
    function: Callable[[int], Any], items: Sequence[int], check: Callable[[], None] = lambda: None
) -> Iterator[Any]:
    """Call a function on every item, as tasks of Ray Data; a single item is done in this process.

    Args:
        function: takes one item and returns a JSON value; must be picklable. A task that dies is run again, so it must
            be safe to repeat.
        items: one task each.
        check: called at the start and every few seconds; whatever it raises ends the work.

    Returns:
        The results in the order of the items, each as soon as it and all before it are there.

    Raises:
        UserError: the worker of a task died in each of a few tries.
    """
    check()
    if len(items) <= 1:
        yield from map(function, items)
        return
    # Most users of this module only want `chunks`: `ldm inspect` must not wait seconds for Ray.
    import ray.data
    import ray.exceptions

    from pipelines.compute.watch import checking

    def call(row: dict[str, Any]) -> dict[str, Any]:
        expect_answers()
        # Rows of Ray Data are dicts of Arrow values; JSON keeps nested results as they were returned.
        return {"position": row["position"], "result": json.dumps(function(row["item"]))}

    rows = [{"position": position, "item": item} for position, item in enumerate(items)]
    # Ray Data would run a task that kills its worker again for ever.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(call, num_cpus=1, max_retries=TRIES - 1)
    # Ray Data yields whatever is ready first.
    waiting: dict[int, Any] = {}
    following = 0
    # Closed when the caller stops early, so that no task runs on behind its back.
    with checking(check), contextlib.closing(iter(dataset.iter_rows())) as rows_done:  # type: ignore[type-var]
        try:
            for row in rows_done:
                waiting[row["position"]] = json.loads(row["result"])
                while following in waiting:
                    yield waiting.pop(following)
                    following += 1
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            raise UserError(
                f"the worker of a task died {TRIES} times: it is out of memory, or native code crashes; see Ray's "
                "logs, then run the same command again"
            ) from None
