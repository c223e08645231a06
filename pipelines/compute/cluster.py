"""The Ray cluster that the stages run on: the one that the recipe names, or one started on this machine for the run."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray.data import DataContext

from pipelines.compute.config import ClusterConfig
from pipelines.errors import UserError

START_ATTEMPTS = 3


@contextlib.contextmanager
def connect(config: ClusterConfig, *, debug: bool = False) -> Iterator[None]:
    """Connect to Ray, or start it, and disconnect at the end. Does nothing in a process that is already connected.

    Args:
        config: the recipe's section on where the work runs.
        debug: show Ray's own log, and what workers print.

    Raises:
        UserError: no cluster answers at the address.
    """
    _quieten(debug)
    ours = not ray.is_initialized()
    if ours:
        with contextlib.nullcontext() if debug else _silent_stderr():
            _init(config, debug)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Otherwise Ray Data raises a wrapper of its own, which loses what it wraps on its way between processes.
    context.raise_original_map_exception = True
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _init(config: ClusterConfig, debug: bool) -> None:
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": "info" if debug else "error", "log_to_driver": debug}
    try:
        if address:
            ray.init(address=address, **options)
        else:
            _start(config, options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {reason}") from error


def _start(config: ClusterConfig, options: dict[str, Any]) -> None:
    """Start Ray here, with a few attempts: its processes get a fixed half minute, which a busy machine may exceed."""
    for attempt in range(START_ATTEMPTS):
        before = set(psutil.Process().children(recursive=True))
        try:
            ray.init(
                num_cpus=config.cpus or max(2, os.cpu_count() or 2),
                include_dashboard=False,
                object_store_memory=config.object_store_mib * 2**20,
                **options,
            )
            return
        except Exception as error:
            ray.shutdown()
            # Ray leaves the processes of a failed start running; they would slow the next one down further.
            for process in set(psutil.Process().children(recursive=True)) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what C++ code writes to the process's stderr: Ray greets with log lines that no option switches off."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _quieten(debug: bool) -> None:
    """Keep Ray's own messages out of the progress display; errors reach the driver as exceptions all the same."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if debug:
        return
    # The loggers are this process's; the variables are for the processes that Ray starts.
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
