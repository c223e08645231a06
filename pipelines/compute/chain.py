"""Work in one or several steps, as operators of Ray Data: one item, one block, one result.

A step runs as tasks, which hold nothing, or on a pool of actors, each of which holds a model. Steps run at the same
time, each on another item, and hand over what they make through the object store (`parcels`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import socket
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.cloudpickle
import ray.data
import ray.exceptions

from pipelines.compute.in_flight import limit_in_flight
from pipelines.compute.parcels import pack, pack_all, unpack
from pipelines.compute.tasks import chunks
from pipelines.compute.watch import checking
from pipelines.errors import UserError, explain
from pipelines.notices import tell
from pipelines.patience import expect_answers

MAX_BLOCKS = 8192
# Of several steps, items of a round for each actor: actors are started anew for every round.
ITEMS_A_ROUND = 128
# An item whose worker died is tried twice more, alone.
ALONE_TRIES = 2
GROUPS_OF_SUSPECTS = 4
# Of one actor in a stage: far more than nodes leave, far fewer than for ever.
MAX_RESTARTS = 20


class Worker(Protocol):
    """Built once in each process, then called with one value at a time: an item, or what the step before returned."""

    def __call__(self, item: Any, /) -> Any: ...


@dataclass(frozen=True)
class PoolSize:
    """Number of actors, and whether each holds a GPU; actors with a GPU reserve no CPU.

    Attributes:
        workers: actors that there is room for now.
        use_gpu: whether each holds a GPU.
        most: actors that the pool may grow to when nodes join the cluster.
        gpus_per_worker: how much of a GPU each holds, if any.
    """

    workers: int
    use_gpu: bool
    most: int
    gpus_per_worker: float = 1.0

    @property
    def device(self) -> str:
        return "cuda" if self.use_gpu else "cpu"


@dataclass(frozen=True)
class TaskStep:
    """A step that runs as tasks.

    Attributes:
        worker: its class; it must be picklable.
        arguments: keyword arguments of its constructor.
        num_cpus: what each task reserves. Tasks of 0 always find room, whatever the actors beside them hold.
        at_once: tasks that run at the same time; None is as many as find room.
        labels: of the nodes that it runs on; none are all nodes.
    """

    worker: type[Worker]
    arguments: dict[str, Any]
    num_cpus: float = 1.0
    at_once: int | None = None
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ActorStep:
    """A step that runs on a pool of actors.

    Attributes:
        worker, arguments, labels: as for tasks.
        size: number of actors, and whether they hold GPUs.
        calls_at_once: threads that call one worker.
    """

    worker: type[Worker]
    arguments: dict[str, Any]
    size: PoolSize
    calls_at_once: int = 1
    labels: dict[str, str] = field(default_factory=dict)


def map_through(
    items: Sequence[dict[str, Any]],
    steps: Sequence[TaskStep | ActorStep],
    *,
    in_flight: int | None = None,
    alone_tries: int = ALONE_TRIES,
    set_aside: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Take every item through all steps; yield results as they become ready.

    A worker that dies is replaced. The items it was at, and those whose intermediate values were lost with a node, are
    done again at the end, each alone in its worker (and with `alone=True` added to it, should a worker want to know),
    so that only one that kills its worker again and again is given up.

    Args:
        items: what the first step is called with, plain values each.
        steps: at least one of them on actors. Between steps anything that can be pickled may pass; large NumPy arrays
            are mapped from the object store, read-only. The last one's results are plain values.
        in_flight: items that may be under way for each actor, from the start of the first step to the end of the last;
            None leaves it to Ray Data, which is for values that take no memory.
        alone_tries: how often an item whose worker died is tried again.
        set_aside: called with an item that killed its worker every time, and returns what is yielded in place of its
            result; or it raises, because there are too many of them. None raises for the first.
        check: called at the start, after each result and every few seconds; whatever it raises ends the work and
            frees the workers. `StageContext.check` stops the work of a driver that has lost its root.

    Raises:
        UserError: raised by a worker, or what `pipelines.errors.explain` makes of a worker's error; ends the work.
    """
    rounds = _in_rounds(_Chain(steps, in_flight), items, alone_tries, set_aside)
    # Closed inside: until then the actors work on, and a failed check has them killed.
    with checking(check) as watcher, contextlib.closing(rounds):
        for result in rounds:
            yield result
            watcher.now()


def _in_rounds(
    chain: _Chain,
    items: Sequence[dict[str, Any]],
    alone_tries: int,
    set_aside: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> Generator[dict[str, Any], None, None]:
    lost: list[dict[str, Any]] = []
    # A block of several items would be as large as all of them together.
    most = max(MAX_BLOCKS, ITEMS_A_ROUND * chain.workers)
    for part in [items] if len(chain.steps) == 1 else chunks(items, most):
        yield from chain.run(part, lost)
    if lost:
        tell(f"workers died while they were at {len(lost)} of {len(items)} items: these are done again, each alone")
    # In small groups, so that a stage in which every item kills its worker does not try all of them.
    for group in chunks([{**item, "alone": True} for item in lost], GROUPS_OF_SUSPECTS * chain.workers):
        suspects: Sequence[dict[str, Any]] = group
        # In rounds, not by Ray's own retries: those come at once, and only after deaths, while a full disk may pass.
        for _ in range(alone_tries):
            lost_again: list[dict[str, Any]] = []
            yield from chain.run(suspects, lost_again, alone=True)
            suspects = lost_again
        for item in suspects:
            if set_aside is None:
                raise UserError(
                    f"the worker of {json.dumps(item)} died {1 + alone_tries} times: it is out of memory, or native "
                    "code crashes; see Ray's logs, then run the same command again"
                )
            yield set_aside(item)


@dataclass(frozen=True)
class _Chain:
    """Takes items through steps, once or a few times each."""

    steps: Sequence[TaskStep | ActorStep]
    in_flight: int | None

    @property
    def workers(self) -> int:
        return sum(step.size.workers for step in self.steps if isinstance(step, ActorStep))

    def run(
        self, items: Sequence[dict[str, Any]], lost: list[dict[str, Any]], *, alone: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Yield results; append to `lost` the items without one.

        Args:
            items: what the first step is called with.
            lost: gets those whose worker died.
            alone: whether each is alone in its worker.
        """
        if not items:
            return
        left = dict(enumerate(items))
        # Closed at once: until then the actors work on, and an exception's traceback would keep them alive.
        with contextlib.closing(iter(self._dataset(items, alone).iter_rows())) as rows:  # type: ignore[type-var]
            try:
                for row in rows:
                    if row["bug"]:
                        raise ray.cloudpickle.loads(row["bug"])
                    if row["error"]:
                        raise UserError(row["error"])
                    del left[row["position"]]
                    yield ray.cloudpickle.loads(row["value"])
            except ray.exceptions.RayActorError as error:
                error.__traceback__ = None
                raise UserError(
                    "workers died again and again before they could begin: out of memory, or native code crashes while "
                    "models are loaded? See Ray's logs, then run the same command again"
                ) from None
        lost += left.values()
        if left:
            # Ray Data holds a dead actor's pool in a cycle of references, and with it the CPUs of its other actors.
            del rows
            gc.collect()

    def _dataset(self, items: Sequence[dict[str, Any]], alone: bool) -> ray.data.Dataset:
        # One block per item: Ray Data would otherwise hand several items to one actor while another is idle. The driver
        # keeps some thousand bytes per block, so that beyond a limit a block holds several items.
        dataset: ray.data.Dataset = ray.data.from_arrow(
            pack_all(items), override_num_blocks=min(len(items), MAX_BLOCKS) if len(self.steps) == 1 else len(items)
        )
        for step in self.steps:
            # Once for all workers: Ray would otherwise send each of them its own. Arrays a node's workers share.
            arguments = ray.put(step.arguments)
            options: dict[str, Any] = {
                "batch_size": 1,
                "batch_format": "pyarrow",
                "label_selector": step.labels or None,
            }
            if isinstance(step, ActorStep):
                dataset = dataset.map_batches(
                    _Reporting,
                    fn_constructor_kwargs={"worker": step.worker, "arguments": arguments},
                    **_actor_options(step, len(items), alone=alone, ahead=len(self.steps) > 1),
                    **options,
                )
            else:
                dataset = dataset.map_batches(
                    _as_task(step.worker, arguments),
                    compute=ray.data.TaskPoolStrategy(step.at_once),
                    num_cpus=step.num_cpus,
                    # As for actors. Ray Data would run a task that kills its worker again for ever.
                    max_retries=0,
                    **options,
                )
        # An item without a result is done again, not the end; errors of the worker itself come as results.
        dataset.context.max_errored_blocks = -1
        if self.in_flight:
            limit_in_flight(dataset.context, self.in_flight)
        return dataset


def _actor_options(step: ActorStep, items: int, *, alone: bool, ahead: bool) -> dict[str, Any]:
    size = step.size
    calls_at_once = 1 if alone else step.calls_at_once
    return {
        "compute": ray.data.ActorPoolStrategy(
            min_size=min(size.workers, items),
            max_size=min(size.most, items),
            max_concurrent_calls_per_actor=calls_at_once,
            # An actor that is told in advance what comes next, to fetch it, loses that too when it dies.
            max_tasks_in_flight_per_actor=1 if alone else max(calls_at_once + ahead, 2),
            enable_true_multi_threading=calls_at_once > 1,
        ),
        "num_cpus": 0 if size.use_gpu else 1,
        "num_gpus": size.gpus_per_worker if size.use_gpu else 0,
        # Ray Data's default is for ever: a worker that dies while it starts, and an item that kills its worker,
        # would be tried until somebody looks.
        "max_restarts": MAX_RESTARTS + items if alone else MAX_RESTARTS,
        "max_task_retries": 0,
    }


def _as_task(worker: type[Worker], arguments: ray.ObjectRef[dict[str, Any]]) -> Callable[[pa.Table], pa.Table]:
    """Return a step as the function of a task; its worker is built once in each process."""

    def call(parcel: pa.Table) -> pa.Table:
        return _built(worker, arguments)(parcel)

    # What Ray's dashboard and `ps` show.
    call.__name__ = worker.__name__
    return call


@functools.lru_cache(maxsize=2)
def _built(worker: type[Worker], arguments: ray.ObjectRef[dict[str, Any]]) -> _Reporting:
    return _Reporting(worker=worker, arguments=arguments)


class _Reporting:
    """A worker that returns its errors as data: Ray Data rewrites exceptions, and would take them for deaths here."""

    def __init__(self, *, worker: type[Worker], arguments: ray.ObjectRef[dict[str, Any]]) -> None:
        expect_answers()
        self.failure: dict[str, Any] = {}
        try:
            self.work = worker(**ray.get(arguments))
        except Exception as error:
            self.failure = _failure(error)

    def __call__(self, parcel: pa.Table) -> pa.Table:
        position = parcel.column("position")[0].as_py()
        if any(parcel.column(name)[0].as_py() for name in ("error", "bug")):
            # Of a step before this one.
            return parcel
        if not self.failure:
            try:
                return pack(position, self.work(unpack(parcel)))
            except Exception as error:
                # The items that still wait for this worker would only fail too, one after the other.
                self.failure = _failure(error)
        return pack(position, **self.failure)


def _failure(error: Exception) -> dict[str, Any]:
    """Return the line that a person should read, or else the exception itself with its traceback: it is a bug."""
    if (known := explain(error)) is not None:
        return {"error": str(known)}
    # Of many nodes one may have a GPU that fails.
    text = f"on {socket.gethostname()}:\n{''.join(traceback.format_exception(error))}"
    try:
        pickled = ray.cloudpickle.dumps(error)
        ray.cloudpickle.loads(pickled).add_note(text)
        error.add_note(text)
        return {"bug": ray.cloudpickle.dumps(error)}
    except Exception:
        # Not every exception survives being pickled.
        return {"bug": ray.cloudpickle.dumps(RuntimeError(text))}
