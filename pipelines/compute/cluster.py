"""The Ray cluster that the stages run on: the one that the recipe names, or one started on this machine for the run."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray.data import DataContext

from pipelines import patience
from pipelines.compute.config import ClusterConfig
from pipelines.compute.resources import waiting_at_most
from pipelines.compute.watch import watch_executions
from pipelines.errors import UserError

START_ATTEMPTS = 3
# What workers on all nodes are given of this process's environment; the cache is that of `pipelines.shards`.
HANDED_ON = (patience.VARIABLE, "LDM_CACHE", "LDM_CACHE_GIB")


@contextlib.contextmanager
def connect(config: ClusterConfig, *, debug: bool = False) -> Iterator[None]:
    """Connect to Ray, or start it, and disconnect at the end. Does nothing in a process that is already connected.

    Args:
        config: the recipe's section on where the work runs.
        debug: show Ray's own log, and what workers print.

    Raises:
        UserError: no cluster answers at the address, or the stages cannot work through it.
    """
    address = _address(config)
    if address and address.startswith("ray://"):
        raise UserError(
            f"the cluster's address is {address}, but Ray Data and Ray Train do not work through Ray Client: submit "
            "the run (`ldm submit RECIPE --address http://HEAD:8265`), or start it on a node of the cluster"
        )
    with (
        _patience(config.store_patience_s),
        waiting_at_most(config.wait_for_resources_s),
        _connected(config, debug),
    ):
        yield


@contextlib.contextmanager
def _connected(config: ClusterConfig, debug: bool) -> Iterator[None]:
    _quieten(debug)
    ours = not ray.is_initialized()
    if ours:
        with contextlib.nullcontext() if debug else _silent_stderr():
            _init(config, debug)
    context = DataContext.get_current()
    watch_executions(context)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Otherwise Ray Data raises a wrapper of its own, which loses what it wraps on its way between processes.
    context.raise_original_map_exception = True
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _address(config: ClusterConfig) -> str | None:
    return config.address or os.environ.get("RAY_ADDRESS")


def _init(config: ClusterConfig, debug: bool) -> None:
    address = _address(config)
    options: dict[str, Any] = {"logging_level": "info" if debug else "error", "log_to_driver": debug}
    try:
        if address:
            ray.init(address=address, **options, **_workers_environment())
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
def _patience(seconds: float | None) -> Iterator[None]:
    """Set the patience with stores in this process's environment, which workers started from here inherit."""
    before = os.environ.get(patience.VARIABLE)
    if seconds is not None:
        os.environ[patience.VARIABLE] = str(seconds)
    # A variable that is no number is said now, not by the first worker whose store fails.
    patience.patience_s()
    try:
        yield
    finally:
        if seconds is not None:
            os.environ.pop(patience.VARIABLE)
            if before is not None:
                os.environ[patience.VARIABLE] = before


def _workers_environment() -> dict[str, Any]:
    """Return the option of `ray.init` that hands variables on to the workers of a cluster that runs already."""
    # A submitted job's own environment reaches its workers, and Ray refuses to have a variable set twice.
    submitted = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    found = {name: os.environ[name] for name in HANDED_ON if name in os.environ and f'"{name}"' not in submitted}
    return {"runtime_env": {"env_vars": found}} if found else {}


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
    # How often an actor or a task is tried has no other name yet in Ray Data (pyproject.toml holds Ray below 2.64).
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
