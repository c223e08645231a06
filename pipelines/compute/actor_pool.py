"""Work spread over a pool of Ray Data actors, each of which holds a model: one item, one task, one result."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.cloudpickle
import ray.data
import ray.exceptions

from pipelines.compute.host_memory import keep_freed_memory
from pipelines.compute.resources import alive, use_gpus
from pipelines.compute.tasks import chunks
from pipelines.compute.watch import checking
from pipelines.errors import UserError, explain
from pipelines.notices import tell
from pipelines.patience import expect_answers

# Kernels may sum in another order with another number of threads. With one thread a worker, results do not depend on
# the number of cores, and the pool keeps all cores busy.
CPU_THREADS_PER_WORKER = 1
MAX_BLOCKS = 8192
# An item whose worker died is tried twice more, alone.
ALONE_TRIES = 2
GROUPS_OF_SUSPECTS = 4
# Of one actor in a stage: far more than nodes leave, far fewer than for ever.
MAX_RESTARTS = 20


class Worker(Protocol):
    """An actor class: built once in each process, then called with one item at a time. Items are plain values."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PoolSize:
    """Number of actors, and whether each holds a GPU; actors with a GPU reserve no CPU.

    Attributes:
        workers: actors that there is room for now.
        use_gpu: whether each holds a GPU.
        most: actors that the pool may grow to when nodes join the cluster.
    """

    workers: int
    use_gpu: bool
    most: int

    @property
    def device(self) -> str:
        return "cuda" if self.use_gpu else "cpu"


def pool_size(
    items: int,
    *,
    workers: int | None = None,
    use_gpu: bool | None = None,
    who: str = "the work",
    check: Callable[[], None] = lambda: None,
) -> PoolSize:
    """Return a pool of one actor per GPU of the cluster, or per CPU core if it has no GPU; never more than items.

    Args:
        items: number of items to work on.
        workers: number of actors that the recipe asks for; None takes all GPUs or cores.
        use_gpu: whether the recipe asks for GPUs; see `resources.use_gpus`.
        who: the stage, for messages.
        check: called while it waits for a GPU.

    Raises:
        UserError: no GPU came.
    """
    advice = "add a node with one, or set use_gpu to false"
    on_gpu = use_gpus(use_gpu, 1, who=who, advice=advice, check=check)
    available = max(alive("GPU" if on_gpu else "CPU"), 1)
    most = max(1, min(workers or items, items))
    # The pool does not wait for more actors than the cluster has room for: they come when it has.
    return PoolSize(workers=min(available, most), use_gpu=on_gpu, most=most)


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

    A worker that dies is replaced. The items it was at are done again at the end, each alone in its worker (and with
    `alone=True` added to it, should the worker want to know), so that only one that kills its worker again and again
    is given up. Results must be JSON values.

    Args:
        items: what the worker is called with, plain values each.
        worker: the actor class; it must be picklable.
        arguments: keyword arguments of its constructor.
        size: number of actors, and whether they hold GPUs.
        calls_at_once: threads that call one worker; more than one for workers that wait more than they compute.
        alone_tries: how often an item whose worker died is tried again.
        set_aside: called with an item that killed its worker every time, and returns what is yielded in place of its
            result; or it raises, because there are too many of them. None raises for the first.
        check: called at the start, after each result and every few seconds; whatever it raises ends the work and
            frees the actors. `StageContext.check` stops the work of a driver that has lost its root.

    Raises:
        UserError: raised by a worker, or what `pipelines.errors.explain` makes of a worker's error; ends the work.
    """
    rounds = _in_rounds(_Pool(worker, arguments, size), items, calls_at_once, alone_tries, set_aside)
    # Closed inside: until then the actors work on, and a failed check has them killed.
    with checking(check) as watcher, contextlib.closing(rounds):
        for result in rounds:
            yield result
            watcher.now()


def _in_rounds(
    pool: _Pool,
    items: Sequence[dict[str, Any]],
    calls_at_once: int,
    alone_tries: int,
    set_aside: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> Generator[dict[str, Any], None, None]:
    lost: list[dict[str, Any]] = []
    yield from pool.run(items, lost, calls_at_once=calls_at_once)
    if lost:
        tell(f"workers died while they were at {len(lost)} of {len(items)} items: these are done again, each alone")
    # In small groups, so that a stage in which every item kills its worker does not try all of them.
    for group in chunks([{**item, "alone": True} for item in lost], GROUPS_OF_SUSPECTS * pool.size.workers):
        poisonous: list[dict[str, Any]] = []
        yield from pool.run(group, poisonous, tries=alone_tries)
        for item in poisonous:
            if set_aside is None:
                raise UserError(
                    f"the worker of {json.dumps(item)} died {1 + alone_tries} times: it is out of memory, or native "
                    "code crashes; see Ray's logs, then run the same command again"
                )
            yield set_aside(item)


@dataclass(frozen=True)
class _Pool:
    """Runs items on actors, once or a few times each."""

    worker: type[Worker]
    arguments: dict[str, Any]
    size: PoolSize

    def run(
        self, items: Sequence[dict[str, Any]], lost: list[dict[str, Any]], *, calls_at_once: int = 1, tries: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Yield results; append to `lost` the items without one, whose worker died in each of their tries."""
        if not items:
            return
        left = dict(enumerate(items))
        # Closed at once: until then the actors work on, and an exception's traceback would keep them alive.
        with contextlib.closing(iter(self._results(items, calls_at_once, tries))) as rows:  # type: ignore[type-var]
            try:
                for row in rows:
                    if row["bug"]:
                        raise ray.cloudpickle.loads(row["bug"])
                    if row["error"]:
                        raise UserError(row["error"])
                    del left[row["position"]]
                    yield json.loads(row["result"])
            except ray.exceptions.RayActorError as error:
                error.__traceback__ = None
                raise UserError(
                    "workers died again and again before they could begin: out of memory, or native code crashes while "
                    "models are loaded? See Ray's logs, then run the same command again"
                ) from None
        lost += left.values()

    def _results(self, items: Sequence[dict[str, Any]], calls_at_once: int, tries: int) -> Iterable[dict[str, Any]]:
        rows = [{"position": position, "item": json.dumps(item)} for position, item in enumerate(items)]
        # One block per item: Ray Data would otherwise hand several items to one actor while another is idle. The driver
        # keeps some thousand bytes per block, so that beyond a limit a block holds several items.
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(items), MAX_BLOCKS)).map(
            _Reporting,  # type: ignore[arg-type]
            # Once for all actors: Ray would otherwise send each of them its own. Arrays a node's actors share.
            fn_constructor_kwargs={"worker": self.worker, "arguments": ray.put(self.arguments)},
            compute=ray.data.ActorPoolStrategy(
                min_size=min(self.size.workers, len(items)),
                max_size=min(self.size.most, len(items)),
                max_concurrent_calls_per_actor=calls_at_once,
                # An actor that is told in advance what comes next loses that too when it dies.
                max_tasks_in_flight_per_actor=1 if tries > 1 else max(calls_at_once, 2),
                enable_true_multi_threading=calls_at_once > 1,
            ),
            num_cpus=0 if self.size.use_gpu else 1,
            num_gpus=1 if self.size.use_gpu else 0,
            # Ray Data's default is for ever: a worker that dies while it starts, and an item that kills its worker,
            # would be tried until somebody looks.
            max_restarts=MAX_RESTARTS + tries * len(items) if tries > 1 else MAX_RESTARTS,
            max_task_retries=tries - 1,
        )
        # An item without a result is done again, not the end; errors of the worker itself come as results.
        dataset.context.max_errored_blocks = -1
        rows_of: Iterable[dict[str, Any]] = dataset.iter_rows()
        return rows_of


class _Reporting:
    """A worker that returns its errors as data: Ray Data rewrites exceptions, and would take them for deaths here."""

    def __init__(self, *, worker: type[Worker], arguments: ray.ObjectRef[dict[str, Any]]) -> None:
        expect_answers()
        self.failure: dict[str, Any] = {}
        try:
            self.work = worker(**ray.get(arguments))
        except Exception as error:
            self.failure = _failure(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = {"position": row["position"], "result": "", "error": "", "bug": b""}
        if not self.failure:
            try:
                return {**answer, "result": json.dumps(self.work(json.loads(row["item"])))}
            except Exception as error:
                # The items that still wait for this worker would only fail too, one after the other.
                self.failure = _failure(error)
        return {**answer, **self.failure}


def _failure(error: Exception) -> dict[str, Any]:
    """Return the line that a person should read, or else the exception itself with its traceback: it is a bug."""
    if (known := explain(error)) is not None:
        return {"error": str(known)}
    text = "".join(traceback.format_exception(error))
    try:
        pickled = ray.cloudpickle.dumps(error)
        ray.cloudpickle.loads(pickled).add_note(text)
        error.add_note(text)
        return {"bug": ray.cloudpickle.dumps(error)}
    except Exception:
        # Not every exception survives being pickled.
        return {"bug": ray.cloudpickle.dumps(RuntimeError(text))}


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
