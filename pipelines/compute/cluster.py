"""The Ray cluster that the stages run on: the one named by the recipe, or one started on this machine for the run."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import psutil

from pipelines.config import Config, runtime
from pipelines.errors import UserError

START_ATTEMPTS = 3


class ClusterConfig(Config):
    """Where the work runs.

    Args:
        address: of a running cluster (`auto`, `10.0.0.1:6379`, `ray://…`); None takes RAY_ADDRESS, which a submitted
            job has set, else starts Ray on this machine for the run.
        cpus: logical CPUs of a Ray started here; None for all cores, and never fewer than 2, so that two workers fit.
        object_store_mib: of a Ray started here.
    """

    address: str | None = runtime(None)
    cpus: int | None = runtime(None, ge=2)
    object_store_mib: int = runtime(512, ge=100)


@contextlib.contextmanager
def connect(config: ClusterConfig, *, debug: bool = False) -> Iterator[None]:
    """Connect to Ray, or start it, and let go at the end; does nothing in a process that is already connected.

    Raises:
        UserError: where no cluster answers at the address.
    """
    _quieten(debug)
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": "info" if debug else "error", "log_to_driver": debug}
    with contextlib.nullcontext() if debug else _silent_stderr():
        import ray
        from ray.data import DataContext

        ours = not ray.is_initialized()
        if ours:
            _init(config, address, options)
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


def _init(config: ClusterConfig, address: str | None, options: dict[str, Any]) -> None:
    import ray

    try:
        if address:
            ray.init(address=address, **options)
        else:
            _start(config, options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {reason}") from error


def _start(config: ClusterConfig, options: dict[str, Any]) -> None:
    """Start Ray here. Its processes get a fixed half minute to come up, which a busy machine may exceed: try again."""
    import ray

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
    """Keep Ray's own messages out of the display; errors reach the driver as exceptions all the same."""
    if not debug:
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(name, value)
