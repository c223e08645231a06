"""A network small enough to train in seconds, which writes down what it sees and can be told to fail."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.errors import TransientError
from pipelines.notices import tell
from pipelines.shards.order import SampleOrder, SamplePosition
from pipelines.shards.randomness import Purpose, generator
from pipelines.stage import StageContext
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from pipelines.tracking import null_stage_tracker
from pipelines.training.config import TrainingConfig
from pipelines.training.fit import finished, fit
from pipelines.training.loader.source import NewArray

# As many samples as three batches have.
ROWS = (7, 0, 12, 5)
SEED = 3
BATCH_SIZE = 8


@dataclass(frozen=True)
class ToyTask:
    """Learn to multiply vectors by a matrix.

    Args:
        log: folder of what the workers saw: a line a sample, `step position shard row`.
        die_at: before which steps the worker of the highest rank kills itself, one after the other.
        controller_dies_at: before which step it kills Ray Train's controller, the first time it gets there.
        bad_at: the position of a sample that is not a number.
        outages: how often that worker loses patience with its store before step 20.
        says: what each worker tells at step 4.
    """

    log: Path
    die_at: tuple[int, ...] = ()
    controller_dies_at: int | None = None
    bad_at: int | None = None
    outages: int = 0
    says: str = ""

    def build(self, device: torch.device) -> "ToyLearner":
        return ToyLearner(self)

    def open(self) -> NoReturn:
        raise AssertionError("a thread makes the batches of the toy")


class ToyBatches:
    def __init__(self, task: ToyTask) -> None:
        self.source = task
        self.reader = ToyReader(task.log)
        # In truth trained on, too: whose loss it is does not matter here, but that it is the same after any restart.
        self.held_out, self.buckets = [(2, 4), (3, 1)], list[str]()
        self.order = SampleOrder(ROWS, SEED, window=2, batch_size=BATCH_SIZE, partitions=64)

    def assemble(self, samples: Sequence[SamplePosition], new: NewArray) -> None:
        x = new("x", (len(samples), 4), np.float32)
        for row, sample in zip(x, samples, strict=True):
            generator(SEED, Purpose.SAMPLE, sample.position).standard_normal(out=row, dtype=np.float32)
            if sample.position == self.source.bad_at:
                row[0] = np.nan
        new("y", (len(samples), 2), np.float32)[:] = x @ (np.arange(8, dtype=np.float32).reshape(4, 2) / 8)
        new("seen", (len(samples), 3), np.int64)[:] = [[each.position, *each.place] for each in samples]


class ToyReader:
    def __init__(self, log: Path) -> None:
        self.log = log

    def key(self, shard: int, row: int) -> str:
        return f"key-{shard}-{row}"

    def fetch_ahead(self, shards: list[int]) -> None:
        pass

    def read_in_ranges(self, shards: Iterable[int]) -> None:
        pass

    def close(self) -> None:
        (self.log / f"closed.{os.getpid()}").touch()


class ToyLearner:
    has_timesteps = True

    def __init__(self, task: ToyTask) -> None:
        self.task = task
        self.network: nn.Module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 2))
        self.batches = ToyBatches(task)
        (task.log / f"started.{os.getpid()}").touch()

    def losses(self, network: Any, batch: dict[str, Tensor]) -> Tensor:
        step = int(batch["seen"][0, 0]) // BATCH_SIZE
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        deaths = len(list(self.task.log.glob("died.*")))
        if is_last and self.task.die_at[deaths : deaths + 1] == (step,):
            (self.task.log / f"died.{deaths}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        marker = self.task.log / "killed"
        if step == self.task.controller_dies_at and is_last and not marker.exists():
            marker.touch()
            # The raylet's other child, lest that of another session on this machine is killed.
            children = psutil.Process(os.getppid()).children()
            next(child for child in children if _is_controller(child)).kill()
        if step == 4 and self.task.says:
            tell(self.task.says)
        lost = len(list(self.task.log.glob("outage.*")))
        if step == 20 and is_last and lost < self.task.outages:
            (self.task.log / f"outage.{lost}").touch()
            raise TransientError("s3://bucket/a cannot be reached (SlowDown 503)")
        with open(self.task.log / f"seen.{os.getpid()}", "a") as file:
            file.writelines(f"{step} {' '.join(map(str, row))}\n" for row in batch["seen"].tolist())
        return self._losses(network, batch)

    def held_out_losses(self, batch: dict[str, Tensor]) -> Tensor:
        return self._losses(self.network, batch)

    def _losses(self, network: Any, batch: dict[str, Tensor]) -> Tensor:
        losses: Tensor = (network(batch["x"]) - batch["y"]).square().mean(dim=1)
        return losses

    def preview(self) -> NDArray[np.uint8]:
        level = np.uint8(abs(float(next(self.network.parameters())[0, 0])) * 255)
        return np.full((4, 4, 3), level, np.uint8)

    def save(self, writer: ArtifactWriter) -> dict[str, Any]:
        writer.commit_once("weights.pt", lambda path: torch.save(self.network.state_dict(), path))
        return {"toy": True}


def _is_controller(process: psutil.Process) -> bool:
    # A process that has just died has no title.
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).startswith("ray::TrainController")
    return False


@dataclass
class Run:
    """A stage's context on a folder, and what its progress display was told.

    Args:
        watch: called with every progress, (steps done, steps in all).
        check: raises where another driver has taken the root over.
    """

    folder: Path
    watch: Callable[[int, int], None] = lambda done, total: None
    check: Callable[[], None] = lambda: None
    progress: list[tuple[int, int]] = field(default_factory=list)

    def fit(self, *, steps: int = 48, workers: int = 2, max_failures: int = 2, **task: Any) -> dict[str, Any]:
        log = self.folder / "log"
        log.mkdir(parents=True, exist_ok=True)
        config = TrainingConfig(
            steps=steps,
            batch_size=BATCH_SIZE,
            learning_rate=0.02,
            warmup_steps=2,
            ema_decay=0.9,
            workers=workers,
            use_gpu=False,
            checkpoint_every_steps=8,
            log_every_steps=4,
            sample_every_steps=16,
            max_failures=max_failures,
        )
        context = StageContext(
            config=config,
            seed=SEED,
            writer=self.writer,
            upstream={},
            tracker=null_stage_tracker(),
            progress=self._progress,
            scratch=self.folder,
            check=self.check,
        )
        details = finished(self.writer)
        return details if details is not None else fit(ToyTask(log=log, **task), config, context)

    def _progress(self, done: int, total: int, **facts: str) -> None:
        self.progress.append((done, total))
        self.watch(done, total)

    @property
    def writer(self) -> ArtifactWriter:
        return ArtifactWriter("toy", "key", Storage(str(self.folder / "artifact")))

    def weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = torch.load(self.folder / "artifact/weights.pt", weights_only=True)
        return weights

    def history(self) -> list[dict[str, float]]:
        history: list[dict[str, float]] = self.writer.storage.read_json("history.json")
        return history

    def seen(self) -> dict[int, set[tuple[int, ...]]]:
        """Return what each step was trained on, (position, shard, row); a step done again must have seen the same."""
        steps: dict[int, set[tuple[int, ...]]] = {}
        for file in (self.folder / "log").glob("seen.*"):
            for line in file.read_text().splitlines():
                step, *sample = map(int, line.split())
                steps.setdefault(step, set()).add(tuple(sample))
        return steps

    def workers_started(self) -> int:
        return len(list((self.folder / "log").glob("started.*")))

    def workers_closed(self) -> int:
        return len(list((self.folder / "log").glob("closed.*")))
