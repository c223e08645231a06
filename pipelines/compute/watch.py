"""The driver's own checks while Ray Data works: every few seconds, however long no result arrives."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

CHECK_EVERY_S = 2.0

_checks: list[Callable[[], None]] = []


class _StoppedError(Exception):
    """Ends an execution, in place of the check's own error: that would hold the frames, and with them the actors."""


@contextlib.contextmanager
def checking(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` now, and every few seconds while data sets run in the block; what it raises ends the block."""
    check()
    last = time.monotonic()
    failure: Exception | None = None

    def regularly() -> None:
        nonlocal last, failure
        if time.monotonic() - last < CHECK_EVERY_S:
            return
        last = time.monotonic()
        try:
            check()
        except Exception as error:
            failure = error.with_traceback(None)
        if failure is not None:
            raise _StoppedError

    _checks.append(regularly)
    try:
        yield
    except _StoppedError as stopped:
        stopped.__traceback__ = None
    finally:
        _checks.remove(regularly)
    if failure is not None:
        raise failure


def watch_executions(context: DataContext) -> None:
    """Have every execution with this context go through the checks of `checking`."""
    if _Watch not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(_Watch)


class _Watch(ExecutionCallback):
    """Runs in the thread that schedules an execution, about ten times a second; what it raises reaches the reader."""

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        try:
            for check in list(_checks):
                check()
        except _StoppedError:
            # After an error Ray Data lets its actors finish what they are at, which may be hours; these are to be gone.
            executor.shutdown = partial(_shut_down_by_force, executor)  # type: ignore[method-assign]
            raise


def _shut_down_by_force(executor: StreamingExecutor, force: bool = False, exception: Exception | None = None) -> None:
    type(executor).shutdown(executor, force=True, exception=exception)
