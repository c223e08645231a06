"""Work spread over a pool of Ray Data actors, each of which holds a model: one item, one task, one result."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.data

from pipelines.compute.host_memory import keep_freed_memory
from pipelines.errors import UserError, explain

# Kernels may sum in another order with another number of threads. With one thread a worker, results do not depend on
# the number of cores, and the pool keeps all cores busy.
CPU_THREADS_PER_WORKER = 1
MAX_BLOCKS = 8192


class Worker(Protocol):
    """An actor class: built once in each process, then called with one item at a time. Items are plain values."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PoolSize:
    """Number of actors, and whether each holds a GPU; actors with a GPU reserve no CPU."""

    workers: int
    use_gpu: bool

    @property
    def device(self) -> str:
        return "cuda" if self.use_gpu else "cpu"


def pool_size(items: int, *, workers: int | None = None, use_gpu: bool | None = None) -> PoolSize:
    """Return a pool of one actor per GPU of the cluster, or per CPU core if it has no GPU; never more than items.

    Args:
        items: number of items to work on.
        workers: number of actors that the recipe asks for; None takes all GPUs or cores.
        use_gpu: whether the recipe asks for GPUs; None takes them if the cluster has any.

    Raises:
        UserError: the recipe asks for GPUs, but the cluster has none.
    """
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
    check: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Call `worker(**arguments)(item)` for every item on a pool of actors; yield results as they become ready.

    A worker that dies is replaced and its items are done again. Results must be JSON values.

    Args:
        items: what the worker is called with, plain values each.
        worker: the actor class; it must be picklable.
        arguments: keyword arguments of its constructor.
        size: number of actors, and whether they hold GPUs.
        calls_at_once: threads that call one worker; more than one for workers that wait more than they compute.
        check: called at the start and after every result; whatever it raises ends the work and frees the actors.
            `StageContext.check` stops the work of a driver that has lost its root.

    Raises:
        UserError: raised by a worker, or what `pipelines.errors.explain` makes of a worker's error; ends the work.
    """
    if not items:
        return
    check()
    # One block per item: Ray Data would otherwise hand several items to one actor while another is idle. The driver
    # keeps some thousand bytes per block, so that beyond a limit a block holds several items.
    dataset = ray.data.from_items(list(items), override_num_blocks=min(len(items), MAX_BLOCKS)).map(
        _Reporting,  # type: ignore[arg-type]
        # Once for all actors: Ray would otherwise send each of them its own. Arrays a node's actors share.
        fn_constructor_kwargs={"worker": worker, "arguments": ray.put(arguments)},
        compute=ray.data.ActorPoolStrategy(
            size=size.workers,
            max_concurrent_calls_per_actor=calls_at_once,
            max_tasks_in_flight_per_actor=max(calls_at_once, 2),
            enable_true_multi_threading=calls_at_once > 1,
        ),
        num_cpus=0 if size.use_gpu else 1,
        num_gpus=1 if size.use_gpu else 0,
    )
    # Closed at once: until then the actors work on, and an exception's traceback would keep them alive.
    with contextlib.closing(iter(dataset.iter_rows())) as rows:  # type: ignore[type-var]
        for row in rows:
            if row["error"]:
                raise UserError(row["error"])
            yield json.loads(row["result"])
            check()


class _Reporting:
    """A worker that returns its UserErrors as data, because Ray Data rewrites the messages of exceptions."""

    def __init__(self, *, worker: type[Worker], arguments: ray.ObjectRef[dict[str, Any]]) -> None:
        self.error = ""
        try:
            self.work = worker(**ray.get(arguments))
        except Exception as error:
            self.error = _message(error)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if self.error:
            return {"result": "", "error": self.error}
        try:
            return {"result": json.dumps(self.work(item)), "error": ""}
        except Exception as error:
            # The items that still wait for this worker would only fail too, one after the other.
            self.error = _message(error)
            return {"result": "", "error": self.error}


def _message(error: Exception) -> str:
    """Return the line that a person should read; raise an error that has none again, since it is a bug."""
    known = explain(error)
    if known is None:
        raise error
    return str(known)


def prepare_torch(device: str) -> None:
    """Fix what the last bits of a result depend on, and keep freed memory; to be called once in each worker."""
    # Not every pool needs torch: workers that download pictures start without the seconds and the memory it takes.
    import torch

    torch.set_num_threads(CPU_THREADS_PER_WORKER)
    keep_freed_memory()
    if device == "cuda":
        # Benchmarking would choose kernels by their speed on this day, and with them the last bits.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
