"""Work spread over a pool of Ray Data actors, each of which holds a model: one item, one task, one result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.errors import UserError, explain

# Kernels may sum in another order with another number of threads: with one a worker, results do not depend on
# the number of cores, and the pool keeps them all busy.
CPU_THREADS_PER_WORKER = 1
MOST_BLOCKS = 8192


class Worker(Protocol):
    """An actor class: built once in each process, then called with one item (plain values) at a time."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PoolSize:
    """How many actors, and whether each has a GPU (then none needs a CPU of its own to be scheduled)."""

    workers: int
    use_gpu: bool

    @property
    def device(self) -> str:
        return "cuda" if self.use_gpu else "cpu"


def pool_size(items: int, *, workers: int | None = None, use_gpu: bool | None = None) -> PoolSize:
    """One actor a GPU of the cluster, or a CPU core where there is no GPU; never more than items.

    Args:
        items: pieces of work.
        workers: what the recipe asks for; None for as many as there are GPUs or cores.
        use_gpu: what the recipe asks for; None for GPUs where the cluster has any.

    Raises:
        UserError: where GPUs are asked for that the cluster does not have.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    if use_gpu and not gpus:
        raise UserError("use_gpu is true, but the Ray cluster has no GPU: set it to false or add a node with one")
    on_gpu = bool(gpus) if use_gpu is None else use_gpu
    available = gpus if on_gpu else max(cpus, 1)
    # More actors than the cluster has room for would never start.
    return PoolSize(workers=max(1, min(workers or available, available, items)), use_gpu=on_gpu)


def map_on_actors(
    items: Sequence[dict[str, Any]],
    worker: type[Worker],
    *,
    arguments: dict[str, Any],
    size: PoolSize,
    calls_at_once: int = 1,
) -> Iterator[dict[str, Any]]:
    """Call `worker(**arguments)(item)` for every item on a pool of actors; results come as they are ready.

    A worker that dies is replaced and its items are done again. Results must be JSON values.

    Args:
        calls_at_once: threads that call one worker; more than one for workers that wait more than they compute.

    Raises:
        UserError: as a worker raised it, or what `pipelines.errors.explain` makes of it; ends the work.
    """
    import ray.data

    if not items:
        return
    # One block an item: Ray Data would otherwise hand several to one actor while another idles. The driver keeps some
    # thousand bytes a block, so that where there are very many items a block holds several.
    dataset = ray.data.from_items(list(items), override_num_blocks=min(len(items), MOST_BLOCKS)).map(
        _Reporting,  # type: ignore[arg-type]
        fn_constructor_kwargs={"worker": worker, "arguments": arguments},
        compute=ray.data.ActorPoolStrategy(
            size=size.workers,
            max_concurrent_calls_per_actor=calls_at_once,
            max_tasks_in_flight_per_actor=max(calls_at_once, 2),
            enable_true_multi_threading=calls_at_once > 1,
        ),
        num_cpus=0 if size.use_gpu else 1,
        num_gpus=1 if size.use_gpu else 0,
    )
    for row in dataset.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield json.loads(row["result"])


class _Reporting:
    """A worker whose UserErrors travel as data, because Ray Data rewrites the messages of exceptions."""

    def __init__(self, *, worker: type[Worker], arguments: dict[str, Any]) -> None:
        self.error = ""
        try:
            self.work = worker(**arguments)
        except Exception as error:
            self.error = _message(error)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if self.error:
            return {"result": "", "error": self.error}
        try:
            return {"result": json.dumps(self.work(item)), "error": ""}
        except Exception as error:
            # The items that are still waiting for this worker would only fail too, one after the other.
            self.error = _message(error)
            return {"result": "", "error": self.error}


def _message(error: Exception) -> str:
    """The line that a person should read; an error without one is a bug, and goes on as it is."""
    known = explain(error)
    if known is None:
        raise error
    return str(known)


def prepare_torch(device: str) -> None:
    """Fix what the last bits of a result depend on, and keep memory that was freed; called once in each worker."""
    import torch

    from pipelines.compute.host_memory import keep_freed_memory

    torch.set_num_threads(CPU_THREADS_PER_WORKER)
    keep_freed_memory()
    if device == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
