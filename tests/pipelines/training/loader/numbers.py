"""Batches of numbers that say which sample they are of; made without torch."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.errors import UserError
from pipelines.notices import tell
from pipelines.shards.order import SampleOrder, SamplePosition
from pipelines.training.loader.source import NewArray

BATCH_SIZE = 8


@dataclass(frozen=True)
class Numbers:
    """A source of batches.

    Args:
        log: a line with the pid and the step for each batch that is begun.
        grows: whether each batch is larger than the one before.
        dies_at, fails_at, breaks_at: the step whose batch kills the process, or is a person's mistake, or a bug.
        tells_at: the step at which it has something to say.
    """

    log: Path
    grows: bool = False
    dies_at: int | None = None
    fails_at: int | None = None
    breaks_at: int | None = None
    tells_at: int | None = None

    def open(self) -> "NumberBatches":
        assert "torch" not in sys.modules, "a process that makes batches is to be small and quick"
        return NumberBatches(self)


class NumberBatches:
    def __init__(self, source: Numbers) -> None:
        self.source = source
        self.reader = NoReader()
        self.order = SampleOrder((7, 0, 12, 5), 3, window=2, batch_size=BATCH_SIZE, partitions=4)

    def assemble(self, samples: Sequence[SamplePosition], new: NewArray) -> None:
        step = samples[0].position // BATCH_SIZE
        with open(self.source.log, "a") as file:
            file.write(f"{os.getpid()} {step}\n")
        if step == self.source.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.source.fails_at:
            raise UserError("shard 3 is damaged: remove it")
        if step == self.source.tells_at:
            tell("the cache is too small")
        if step == self.source.breaks_at:
            raise ZeroDivisionError("a bug")
        columns = 5000 * step if self.source.grows else 3
        values = new("values", (len(samples), columns), np.float32)
        values[:] = np.array([sample.position for sample in samples])[:, None]
        new("places", (len(samples), 2), np.int64)[:] = [sample.place for sample in samples]


class NoReader:
    def key(self, shard: int, row: int) -> str:
        return f"{shard}-{row}"

    def fetch_ahead(self, shards: list[int]) -> None:
        pass

    def close(self) -> None:
        pass
