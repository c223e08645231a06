"""GPUs and CPUs of the cluster: what a recipe asks for is requested, and waited for, rather than done without."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from pipelines.errors import UserError
from pipelines.notices import tell

DEFAULT_WAIT_S = 600.0
TELL_EVERY_S = 60.0
# More are asked for once these are there: an autoscaler is told of every one of them by itself.
MOST_REQUESTED = 1024
_POLL_S = 1.0

_wait_s = DEFAULT_WAIT_S
_ANYWHERE: Mapping[str, str] = MappingProxyType({})


@contextlib.contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Wait that long for resources while the block runs."""
    global _wait_s
    before, _wait_s = _wait_s, seconds
    try:
        yield
    finally:
        _wait_s = before


def alive(resource: str, labels: Mapping[str, str] = _ANYWHERE) -> int:
    """Return how many nodes with these labels have of a resource (`GPU`, `CPU`), whether they are in use or not."""
    return int(sum(node["Resources"].get(resource, 0) for node in _nodes(labels)))


def cores_of_nodes(labels: Mapping[str, str] = _ANYWHERE) -> list[float]:
    """Return the CPU cores of each node with these labels."""
    return [node["Resources"].get("CPU", 0.0) for node in _nodes(labels)]


def smallest_object_store(labels: Mapping[str, str] = _ANYWHERE) -> int:
    """Return the bytes of the smallest object store of the nodes with these labels; 0 if there are none."""
    return int(min((node["Resources"].get("object_store_memory", 0) for node in _nodes(labels)), default=0))


def _nodes(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and labels.items() <= node["Labels"].items()]


def require_nodes(labels: Mapping[str, str], *, who: str, check: Callable[[], None] = lambda: None) -> None:
    """Wait for a node with these labels: work for nodes that nobody has would wait for ever, and say nothing.

    Args:
        labels: of the nodes; none are all nodes.
        who: what is to run there, for the messages.
        check: called while it waits.

    Raises:
        UserError: none came within `cluster.wait_for_resources_s`.
    """
    asked = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
    _wait_until(
        lambda: bool(_nodes(labels)),
        lambda seconds: f"{who}: waiting for a node with the labels {asked}; for {seconds:.0f} s more",
        lambda: (
            f"{who} is for nodes with the labels {asked}, but after {_wait_s:.0f} s the cluster has none: start one "
            f"with `ray start --labels {asked}`, or change the recipe"
        ),
        check,
    )


def use_gpus(
    wanted: bool | None,
    count: int,
    *,
    who: str,
    advice: str,
    labels: Mapping[str, str] = _ANYWHERE,
    check: Callable[[], None] = lambda: None,
) -> bool:
    """Decide between GPUs and CPUs; wait for GPUs that are wanted and not there yet, and say so.

    Args:
        wanted: whether the recipe asks for GPUs. None takes them wherever the cluster has some, has had some, or has
            an autoscaler that may add some: not to find them at this moment is no reason to do without.
        count: how many are needed to begin.
        who: what needs them, for the messages.
        advice: what to do if they do not come.
        labels: of the nodes whose GPUs count.
        check: called while it waits.

    Raises:
        UserError: they did not come within `cluster.wait_for_resources_s`.
    """
    if wanted is False:
        return False
    if wanted is None and not _may_have_gpus():
        tell(f"{who}: on CPUs, since the cluster has no GPU")
        return False
    with requested({"GPU": 1}, count) if alive("GPU", labels) < count else contextlib.nullcontext():
        _wait_until(
            lambda: alive("GPU", labels) >= count,
            lambda seconds: (
                f"{who}: waiting for {count} GPUs, the cluster has {alive('GPU', labels)}; for {seconds:.0f} s more"
            ),
            lambda: (
                f"{who} needs {count} GPUs, but after {_wait_s:.0f} s the cluster has {alive('GPU', labels)}: {advice}"
            ),
            check,
        )
    return True


def _wait_until(
    there: Callable[[], bool],
    waiting: Callable[[float], str],
    missing: Callable[[], str],
    check: Callable[[], None],
) -> None:
    """Wait until something is there; tell what `waiting` returns for the seconds left, raise what `missing` returns."""
    until, told_at = time.monotonic() + _wait_s, -TELL_EVERY_S
    while not there():
        check()
        now = time.monotonic()
        if now >= until:
            raise UserError(missing())
        if now - told_at >= TELL_EVERY_S:
            tell(waiting(until - now))
            told_at = now
        time.sleep(min(_POLL_S, max(until - now, 0.0)))


def _may_have_gpus() -> bool:
    # Nodes that have left count: the others were not meant to do their work.
    return any(node["Resources"].get("GPU") for node in ray.nodes()) or most_possible("GPU") > 0


def most_possible(resource: str) -> int:
    """Return how many an autoscaler could bring the cluster to; 0 without an autoscaler."""
    # Ray Train's own way to learn it; there is no public one.
    found = ray._private.state.state.get_max_resources_from_cluster_config()
    return int((found or {}).get(resource, 0))


@contextlib.contextmanager
def requested(bundle: dict[str, float], count: int) -> Iterator[None]:
    """Ask the autoscaler for `count` times these resources while the block runs; without one nobody listens."""
    request_resources(bundles=[bundle] * min(count, MOST_REQUESTED))
    try:
        yield
    finally:
        request_resources(bundles=[])
