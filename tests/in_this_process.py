"""Stages in this process: real encoders, learners and samplers, but a pool of workers that is a loop over the items.

For tests of what stages compute and hand on to each other: to start a worker takes seconds, most of them for importing
PyTorch. That the same work is done by workers of Ray, and what becomes of it when they die, other tests show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray
import torch

from pipelines.compute.chain import ActorStep, TaskStep
from pipelines.stage import StageContext
from pipelines.stages.autoencoder import work as autoencoder
from pipelines.stages.diffusion import work as diffusion
from pipelines.stages.evaluate import work as evaluate
from pipelines.stages.latents import work as latents
from pipelines.training.config import TrainingConfig
from pipelines.training.fit import finished
from pipelines.training.loop import Rank, TrainingLoop
from pipelines.training.relay import Message
from pipelines.training.task import Task


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Have training, encoding and sampling done in this process; pairs are made by Ray as ever."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "map_through", call_all)
        patch.setattr(evaluate, "map_on_actors", map_on_one)
        for stage in (autoencoder, diffusion):
            patch.setattr(stage, "fit", _fit)
        try:
            yield
        finally:
            # Of these a worker takes one.
            torch.set_num_threads(threads)


def call_all(
    items: Iterable[Any],
    steps: Iterable[TaskStep | ActorStep],
    *,
    check: Callable[[], None] = lambda: None,
    **_: Any,
) -> Iterator[Any]:
    """Take every item through all steps, and check after each, as `map_through` does."""
    workers = [step.worker(**_sent(step.arguments)) for step in steps]
    for value in items:
        for worker in workers:
            value = worker(value)
        yield value
        check()


def map_on_one(
    items: Iterable[Any], worker: Any, *, arguments: dict[str, Any], size: Any, **options: Any
) -> Iterator[Any]:
    """Call one worker on every item, as `map_on_actors` does."""
    return call_all(items, [ActorStep(worker, arguments, size)], **options)


def _sent(value: Any) -> Any:
    """Return what a worker would be given: a copy, of what can be pickled alone."""
    return ray.cloudpickle.loads(ray.cloudpickle.dumps(value))


@dataclass(frozen=True)
class _Driver:
    """A relay to a driver in the same process, which never stops the training."""

    context: StageContext
    steps: int

    def send(self, message: Message) -> None:
        message.forward(self.context, self.steps)

    def stop_ordered(self) -> None:
        return None


class _NoCheckpoints:
    """Those of a training that is never interrupted."""

    def newest(self, device: torch.device) -> None:
        return None

    def save(self, step: int, state: dict[str, Any] | None) -> None:
        return None


def _fit(task: Task, config: TrainingConfig, context: StageContext) -> dict[str, Any]:
    rank, relay = Rank(0, 1, torch.device("cpu")), _Driver(context, config.steps)
    loop = TrainingLoop(_sent(task), config, context.seed, context.writer, relay, rank)  # type: ignore[arg-type]
    loop.run(_NoCheckpoints())  # type: ignore[arg-type]
    details = finished(context.writer)
    assert details is not None, "rank 0 writes the details before it returns"
    return details
