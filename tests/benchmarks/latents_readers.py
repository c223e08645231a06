"""One reader of latents in a process of its own: `python -m tests.benchmarks.latents_readers NAME FOLDER …`.

Each gives batches of tensors in its shuffled order, from the local disk, in this process alone (Ray Data reads in
processes of its own, whose time the command's tree counts). Prints one JSON object: see `Run`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.benchmarks.latents_data import LENGTH, SHAPE, make_parquet, numbers_of, sample, source_of

# The first of them mix as well as our own order does over 16 shards; see `quality` in bench_latents.
WEBDATASET_BUFFER, RAY_BUFFER = 4000, 4000
Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Run:
    """Samples after the first epoch, the seconds and CPU seconds they took, and the order of that epoch."""

    samples: int
    seconds: float
    cpu_s: float
    first_batch_s: float
    peak_mib: float
    order: list[int]


def ours(folder: Path, batch_size: int) -> Iterator[Batch]:
    """Read checked samples, with the draws of timestep, caption and dropout, in the thread that asks for them."""
    import torch

    from pipelines.training.loader.source import arrays_of

    batches = source_of(Artifact("latents", "bench", Storage(str(folder / "ours"))), batch_size=batch_size).open()
    step = 0
    while True:
        found = arrays_of(batches, batches.order.slice(step, 0, 1))
        yield torch.from_numpy(found["moments"]), torch.from_numpy(found["tokens"])
        step += 1


def webdataset(folder: Path, batch_size: int) -> Iterator[Batch]:
    """Read the same tars as its documentation does, without our json."""
    import webdataset as wds

    tars = sorted(map(str, (folder / "ours").glob("*.tar")))
    epoch = 0
    while True:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(tars, seed=epoch),
            wds.shuffle(len(tars)),
            wds.tarfile_to_samples(select_files=lambda name: name.endswith(".npy")),
            wds.shuffle(WEBDATASET_BUFFER, initial=WEBDATASET_BUFFER, rng=np_random(epoch)),
            wds.decode(),
            wds.to_tuple("latent.npy", "tokens.npy"),
            wds.batched(batch_size, collation_fn=stacked, partial=False),
        )
        yield from pipeline
        epoch += 1


def streaming(folder: Path, batch_size: int) -> Iterator[Batch]:
    """Read MDS by mosaicml-streaming through torch's DataLoader in this process."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(
        local=str(folder / "mds"),
        shuffle=True,
        shuffle_seed=0,
        batch_size=batch_size,
        num_canonical_nodes=1,
        shuffle_algo="py1e",
        shuffle_block_size=4000,
    )

    def collate(found: list[dict[str, Any]]) -> Batch:
        return stacked([(each["latent"], each["tokens"]) for each in found])

    while True:
        yield from DataLoader(dataset, batch_size=batch_size, num_workers=0, collate_fn=collate, drop_last=True)


def ray_data(folder: Path, batch_size: int) -> Iterator[Batch]:
    """Read Parquet by Ray Data on one core."""
    import ray
    import torch

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = sorted(map(str, (folder / "parquet").glob("*.parquet")))

    def tensors(found: dict[str, Any]) -> Batch:
        count = len(found["latent"])
        latent = np.frombuffer(b"".join(found["latent"]), np.float16).reshape(count, *SHAPE)
        tokens = np.frombuffer(b"".join(found["tokens"]), np.uint16).reshape(count, LENGTH)
        return torch.from_numpy(latent.copy()), torch.from_numpy(tokens.astype(np.int64))

    epoch = 0
    while True:
        dataset = ray.data.read_parquet(paths, shuffle=ray.data.FileShuffleConfig(seed=epoch))
        yield from dataset.iter_torch_batches(
            batch_size=batch_size,
            local_shuffle_buffer_size=RAY_BUFFER,
            local_shuffle_seed=epoch,
            drop_last=True,
            collate_fn=tensors,
        )
        epoch += 1


READERS: dict[str, Callable[[Path, int], Iterator[Batch]]] = {
    "ours": ours,
    "webdataset": webdataset,
    "streaming": streaming,
    "ray_data": ray_data,
}


def stacked(found: list[tuple[Any, Any]]) -> Batch:
    """Collate arrays as tensors: one copy, as ours."""
    import torch

    return (
        torch.from_numpy(np.stack([latent for latent, _ in found])),
        torch.from_numpy(np.stack([tokens[0] for _, tokens in found]).astype(np.int64)),
    )


def np_random(seed: int) -> Any:
    import random

    return random.Random(seed)


def read(batches: Iterator[Batch], samples: int, epoch: int) -> Run:
    """Take an epoch of about `epoch` samples, whose order is kept; then time at least `samples` more."""
    order: list[int] = []
    opened = time.perf_counter()
    moments, tokens = next(batches)
    order += numbers_of(tokens)
    first_batch_s = time.perf_counter() - opened
    # What opening takes, a data set of this size would weigh too much. What was read ahead in the first epoch does not
    # count either: each later one is read anew.
    while len(order) + len(tokens) <= epoch:
        _, tokens = next(batches)
        order += numbers_of(tokens)
    count, started, cpu = 0, time.perf_counter(), time.process_time()
    while count < samples:
        moments, tokens = next(batches)
        assert moments.shape[1:] == SHAPE
        count += len(moments)
    return Run(
        count, time.perf_counter() - started, time.process_time() - cpu, first_batch_s, peak_mib(), order[:epoch]
    )


def peak_mib(process: int | str = "self") -> float:
    """Return the most memory that a process has held; unlike `getrusage`, not that of whoever started it."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def write_mds(folder: Path, count: int) -> None:
    """Write the samples as mosaicml-streaming does."""
    from streaming import MDSWriter

    columns = {
        "latent": "ndarray:float16:" + ",".join(map(str, SHAPE)),
        "tokens": f"ndarray:uint16:1,{LENGTH}",
    }
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 24) as out:
        for number in range(count):
            latent, tokens = sample(number)
            out.write({"latent": latent, "tokens": tokens})


def streaming_python(scratch: Path) -> Path | None:
    """Return the interpreter of an environment with mosaicml-streaming over our own; None if it cannot be made."""
    folder, uv = scratch / "streaming-env", Path(sys.executable).parent / "uv"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    # Torch and all that is shared are ours: the same versions, and nothing large is fetched.
    packages = ("mosaicml-streaming==0.13.0", "zstd", "xxhash", "python-snappy", "cramjam", "Brotli", "catalogue")
    try:
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (shared,) = [path for path in sys.path if path.startswith(sys.prefix) and path.endswith("site-packages")]
        (site / "shared.pth").write_text(f"{shared}\n")
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", python, *packages]
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"mosaicml-streaming cannot be installed here ({error}): its part is left out", file=sys.stderr)
        return None
    (folder / "ready").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("reader", choices=[*READERS, "write_mds", "write_parquet"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--epoch", type=int, default=0, help="samples of the epoch before, whose order is told")
    options = parser.parse_args()
    if options.reader == "write_mds":
        write_mds(options.folder / "mds", options.samples)
        return
    if options.reader == "write_parquet":
        make_parquet(options.folder / "parquet", options.samples, options.epoch)
        return
    import torch

    torch.set_num_threads(1)
    run = read(READERS[options.reader](options.folder, options.batch_size), options.samples, options.epoch)
    print(json.dumps(asdict(run)), flush=True)
    # Neither Ray nor streaming's shared memory is waited for.
    sys.stdout.flush()
    if options.reader != "streaming":
        os._exit(0)


if __name__ == "__main__":
    main()
