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

_watchers: list[Watcher] = []


class _StoppedError(Exception):
    """Ends an execution, in place of the check's own error: that would hold the frames, and with them the actors."""


class Watcher:
    """A check of the driver's, and what it raised."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.failure: Exception | None = None
        self._check = check
        self._last = 0.0

    def now(self) -> None:
        """Make the check; what it raises ends the block of `checking`, and frees the actors without waiting."""
        self._last = time.monotonic()
        try:
            self._check()
        except Exception as error:
            self.failure = error.with_traceback(None)
            raise _StoppedError from None

    def regularly(self) -> None:
        """Make the check unless the last one was a moment ago."""
        if time.monotonic() - self._last >= CHECK_EVERY_S:
            self.now()


@contextlib.contextmanager
def checking(check: Callable[[], None]) -> Iterator[Watcher]:
    """Call `check` now, and every few seconds while data sets run in the block; what it raises ends the block."""
    check()
    watcher = Watcher(check)
    _watchers.append(watcher)
    try:
        yield watcher
    except _StoppedError as stopped:
        stopped.__traceback__ = None
    finally:
        _watchers.remove(watcher)
    if watcher.failure is not None:
        raise watcher.failure


def watch_executions(context: DataContext) -> None:
    """Have every execution with this context go through the checks of `checking`."""
    if _Watch not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(_Watch)


class _Watch(ExecutionCallback):
    """Runs in the thread that schedules an execution, about ten times a second; what it raises reaches the reader."""

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        executor.shutdown = partial(_shut_down, executor)  # type: ignore[method-assign]

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        for watcher in list(_watchers):
            watcher.regularly()


def _shut_down(executor: StreamingExecutor, force: bool = False, exception: Exception | None = None) -> None:
    """End an execution; after a failed check by force: Ray Data's actors would else finish what they are at, hours."""
    failed = any(watcher.failure for watcher in _watchers)
    type(executor).shutdown(executor, force=force or failed, exception=exception)
