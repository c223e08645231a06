"""What our loader costs a training process: `python -m tests.benchmarks.latents_loader WORK FOLDER …`.

`main_thread` takes batches from the loader's processes, as a training process does; `first_batch` opens an artifact and
makes the batch of a step far in. Each prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.benchmarks.latents_data import source_of
from tests.benchmarks.latents_readers import peak_mib


def main_thread(artifact: Artifact, options: argparse.Namespace) -> dict[str, Any]:
    """Take batches, and count the time of this thread alone."""
    import torch

    from pipelines.training.loader.processes import ProcessLoader

    source = source_of(artifact, batch_size=options.batch_size * options.world_size)
    loader = ProcessLoader(
        source, options.rank, options.world_size, 0, 10**9, processes=options.processes, device=torch.device("cpu")
    )
    # Slots are mapped with the first batch in each.
    for _ in range(10 * options.processes):
        loader.next()
    batches = max(1, options.samples // options.batch_size)
    started, thread = time.perf_counter(), time.thread_time()
    for _ in range(batches):
        loader.next()
    seconds, thread_s = time.perf_counter() - started, time.thread_time() - thread
    peak = max(peak_mib(worker.process.pid) for worker in loader._workers)
    loader.close()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    samples = batches * options.batch_size
    return {
        "samples": samples,
        "seconds": seconds,
        "samples_per_s": samples / seconds,
        "main_thread_ms_per_1000": 1e6 * thread_s / samples,
        "process_peak_mib": peak,
        "process_cpu_ms_per_1000": 1e6 * (children.ru_utime + children.ru_stime) / samples,
    }


def first_batch(artifact: Artifact, options: argparse.Namespace) -> dict[str, Any]:
    """Open an artifact, and make the batch that holds a position; torch is not imported, as in a loader's process."""
    from pipelines.training.loader.source import arrays_of

    started = time.perf_counter()
    batches = source_of(artifact, batch_size=options.batch_size).open()
    step = options.position // options.batch_size
    arrays_of(batches, batches.order.slice(step, 0, 1))
    seconds = time.perf_counter() - started
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    return {"seconds": seconds, "own_mib": own / 1024, "peak_mib": peak_mib()}


WORK = {"main_thread": main_thread, "first_batch": first_batch}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=list(WORK))
    parser.add_argument("folder", help="of the artifact")
    parser.add_argument("--batch-size", type=int, default=64, help="of this process")
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--position", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(WORK[options.work](Artifact("latents", "bench", Storage(options.folder)), options)))


if __name__ == "__main__":
    main()
