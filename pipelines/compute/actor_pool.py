"""Work spread over a pool of actors, each of which holds a model: one item, one task, one result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pipelines.compute.chain import ALONE_TRIES, ActorStep, PoolSize, Worker, map_through
from pipelines.compute.host_memory import keep_freed_memory
from pipelines.compute.resources import alive, cores_of_nodes, use_gpus
from pipelines.errors import UserError

# Kernels may sum in another order with another number of threads. With one thread a worker, results do not depend on
# the number of cores, and the pool keeps all cores busy.
CPU_THREADS_PER_WORKER = 1


def pool_size(
    items: int,
    *,
    workers: int | None = None,
    use_gpu: bool | None = None,
    gpus_per_worker: float = 1.0,
    cpus_of_tasks: float = 0.0,
    labels: Mapping[str, str] = MappingProxyType({}),
    labels_of_tasks: Mapping[str, str] = MappingProxyType({}),
    who: str = "the work",
    check: Callable[[], None] = lambda: None,
) -> PoolSize:
    """Return a pool for all GPUs of the cluster, or one actor per CPU core if it has no GPU; never more than items.

    Args:
        items: number of items to work on.
        workers: number of actors that the recipe asks for; None takes all GPUs or cores.
        use_gpu: whether the recipe asks for GPUs; see `resources.use_gpus`.
        gpus_per_worker: how much of a GPU each takes.
        cpus_of_tasks: cores that actors without a GPU leave to a task of another step, wherever Ray places them.
        labels: of the nodes that the actors run on.
        labels_of_tasks: of those that the tasks run on.
        who: the stage, for messages.
        check: called while it waits for a GPU.

    Raises:
        UserError: no GPU came, or there are too few cores for an actor and the tasks.
    """
    advice = "add a node with one, or set use_gpu to false"
    on_gpu = use_gpus(use_gpu, 1, labels=labels, who=who, advice=advice, check=check)
    most = max(1, min(workers or items, items))
    if on_gpu:
        # The pool does not wait for more actors than the cluster has room for: they come when it has.
        available = max(int(alive("GPU", labels)) * int(1 / gpus_per_worker), 1)
        return PoolSize(min(available, most), True, most, gpus_per_worker)
    cores = alive("CPU", labels)
    if not cpus_of_tasks:
        return PoolSize(min(max(cores, 1), most), False, most)
    available = min(cores, _beside_tasks(cpus_of_tasks, labels, labels_of_tasks))
    if available < 1:
        raise UserError(
            f"{who} needs a CPU core for its model and {cpus_of_tasks:g} for tasks beside it, but the cluster has "
            f"{alive('CPU')}: lower the CPUs of tasks (0 lets them run beside the model), or add a node"
        )
    # The pool does not grow when nodes join: its new actors might take the cores that tasks need.
    return PoolSize(min(available, most), False, min(available, most))


def _beside_tasks(cpus: float, labels: Mapping[str, str], labels_of_tasks: Mapping[str, str]) -> int:
    """Return how many actors of one core leave some node with `cpus` for a task, wherever Ray places them."""
    shared = cores_of_nodes({**labels, **labels_of_tasks}) if _agree(labels, labels_of_tasks) else []
    if sum(cores >= cpus for cores in cores_of_nodes(labels_of_tasks)) > sum(cores >= cpus for cores in shared):
        # Tasks have a node of their own.
        return int(sum(cores_of_nodes(labels)))
    # One less than what it takes to leave no node with room.
    return sum(int(cores) - math.ceil(cpus) + 1 for cores in shared if cores >= cpus) - 1


def _agree(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    return all(others.get(name, value) == value for name, value in some.items())


def map_on_actors(
    items: Sequence[dict[str, Any]],
    worker: type[Worker],
    *,
    arguments: dict[str, Any],
    size: PoolSize,
    calls_at_once: int = 1,
    alone_tries: int = ALONE_TRIES,
    set_aside: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Call `worker(**arguments)(item)` for every item on a pool of actors; yield results as they become ready.

    Args:
        items: what the worker is called with, plain values each.
        worker: the actor class; it must be picklable.
        arguments: keyword arguments of its constructor.
        size: number of actors, and whether they hold GPUs.
        calls_at_once: threads that call one worker; more than one for workers that wait more than they compute.
        alone_tries, set_aside, check: what is done about items that kill their worker, and the driver's own checks: see
            `map_through`.

    Raises:
        UserError: see `map_through`.
    """
    step = ActorStep(worker, arguments, size, calls_at_once)
    return map_through(items, [step], alone_tries=alone_tries, set_aside=set_aside, check=check)


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
