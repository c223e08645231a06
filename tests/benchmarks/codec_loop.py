"""The codec alone: the same photographs in memory, decoded at a scale, resized and encoded; one process a core."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

PROCESSES = 2


@dataclass(frozen=True)
class CodecRun:
    """What the processes did together; `wall_s` is the mean of theirs."""

    images: int
    cpu_s: float
    wall_s: float

    def figures(self) -> dict[str, float]:
        return {
            "images": self.images,
            "cpu_s": self.cpu_s,
            "wall_s": self.wall_s,
            "images_per_s": self.images / self.wall_s,
            "images_per_cpu_s": self.images / self.cpu_s,
        }


def run_codec(photographs: list[Path], images: int, size: int, *, antialias: bool) -> CodecRun:
    """Convert `images` photographs to `size` pixels on the shorter side, in two processes at once.

    Args:
        antialias: with the small blur that our stage does too; without it, the codec and the resizing are all there is.
    """
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(PROCESSES), context.Queue()
    share = images // PROCESSES
    arguments = (share, size, antialias, start, results)
    workers = [
        context.Process(target=_convert, args=(photographs[first::PROCESSES], *arguments)) for first in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    times = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return CodecRun(share * PROCESSES, sum(cpu_s for cpu_s, _ in times), statistics.mean(wall_s for _, wall_s in times))


def _convert(
    photographs: list[Path],
    images: int,
    size: int,
    antialias: bool,
    start: Barrier,
    results: Queue[tuple[float, float]],
) -> None:
    # Here and not above: it sets OpenCV's environment, which the commands we compare with would inherit.
    from tests.benchmarks.bare_codec import bare_codec

    data = [path.read_bytes() for path in photographs]
    bare_codec(data[0], size, antialias=antialias)
    start.wait()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for number in range(images):
        bare_codec(data[number % len(data)], size, antialias=antialias)
    results.put((time.process_time() - cpu_s, time.perf_counter() - wall_s))
