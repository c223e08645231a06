"""The encoding of latents against the bare encoder: `python -m tests.benchmarks.encode_latents`.

ours    the stage's operators, from tars of JPEGs to committed shards: reading and decoding, encoding, writing and
        committing, on a Ray with as many logical CPUs as there are encoders
bare    the same encoder in as many processes, pictures decoded in memory, latents thrown away

On CPUs both have one thread an encoder, the same batches, and the same cores, on which ours does all else too. On a
GPU (`--device cuda`; one encoder a GPU, compiled, bf16) bare has its pictures in the GPU's memory, and ours takes what
CPU cores it needs. In turn, ours first in one round and last in the next. The starts (processes, imports, weights, a
first batch) are left out: ours counts from the first shard of each encoder, bare from when all are ready.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from PIL import Image

from ldm_core import checkpoint, presets
from ldm_core.networks.autoencoder import build_first_stage
from pipelines.compute.actor_pool import pool_size
from pipelines.compute.chain import map_through
from pipelines.compute.cluster import connect
from pipelines.compute.config import ClusterConfig
from pipelines.conditions.kinds import kind_of
from pipelines.shards.format import ShardWriter
from pipelines.stage import StageContext
from pipelines.stages.autoencoder.artifact import FORMAT_VERSION as AUTOENCODER_FORMAT
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.encoding.encode import EncodeShard
from pipelines.stages.latents.rows import PairsRows
from pipelines.stages.latents.work import SHARDS_A_CORE, SHARDS_A_GPU, steps
from pipelines.stages.pairs.artifact import PAIRS_FORMAT
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from pipelines.tracking import null_stage_tracker
from tests.benchmarks.photographs import make_photographs
from tests.benchmarks.timing import machine, synchronize
from tests.benchmarks.tool_run import dump
from tests.tiny_artifacts import finish

SIDE = 256
DEFINITIONS = {
    "encode_vs_bare": "images/s of ours over those of bare, median of the rounds' ratios",
    "ours": "the stage's operators, from tars of JPEGs to committed shards, from the first shard of each encoder on",
    "bare": "the same encoder in as many processes, pictures decoded in memory, from when all are ready to the last",
    "cores": "on CPUs: encoders of one thread each, on as many cores; ours does all else on these too",
    "cores_busy": "CPU cores that the whole machine kept busy while ours was timed",
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is encoded: shards for each encoder, pictures a shard, and the width of kl-f8 (128 is the published one)."""

    encoders: int
    device: str = "cpu"
    shards: int = 5
    rows: int = 24
    batch_size: int = 4
    base_channels: int = 128


def encode_vs_bare(work: Work, *, rounds: int = 3) -> dict[str, Any]:
    """Measure both in turn.

    Args:
        work: what is encoded.
        rounds: of each.

    Returns:
        The median ratio, the images/s of each round and their medians, and what was measured.
    """
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    busy = []
    with tempfile.TemporaryDirectory(prefix="bench-encode-") as scratch:
        root = Path(scratch)
        pairs, pictures = _pairs(root, work)
        first_stage = _first_stage(root, work)
        for number in range(rounds):
            for name in ("ours", "bare") if number % 2 == 0 else ("bare", "ours"):
                if name == "ours":
                    rate, cores = _ours(root / f"round-{number}", pairs, first_stage, work)
                    busy.append(cores)
                else:
                    rate = _bare(first_stage, pictures, work)
                found[name].append(rate)
                print(f"  {name} {rate:.3f} images/s", flush=True)
    ratios = [ours / bare for ours, bare in zip(found["ours"], found["bare"], strict=True)]
    return {
        "encode_vs_bare": statistics.median(ratios),
        "ratios_of_rounds": ratios,
        "images_per_s": {name: statistics.median(rates) for name, rates in found.items()},
        "cores_busy": statistics.median(busy),
        "work": dataclasses.asdict(work) | {"side": SIDE},
    }


def _pairs(root: Path, work: Work) -> tuple[Artifact, np.ndarray]:
    """Make the pairs; return them, and the pictures of one shard (rows, 256, 256, 3)."""
    photographs = [cv2.imread(str(path)) for path in make_photographs(root / "photographs", None, 4)]
    random = np.random.default_rng(0)
    jpegs, pictures = [], []
    for number in range(work.rows):
        y, x = random.integers(0, 864 - SIDE), random.integers(0, 1152 - SIDE)
        crop = photographs[number % len(photographs)][y : y + SIDE, x : x + SIDE]
        jpegs.append(bytes(cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]))
        pictures.append(np.asarray(Image.open(io.BytesIO(jpegs[-1])).convert("RGB")))
    writer = ArtifactWriter("pairs", "pairs", Storage(str(root / "pairs")))
    for shard in range(work.shards * work.encoders):
        name = f"{shard:06d}.tar"
        with writer.storage.writer(name) as path, ShardWriter(path) as tar:
            for row, jpeg in enumerate(jpegs):
                caption = f"picture {row} of shard {shard}"
                files = {"jpg": jpeg, "txt": caption.encode(), "json": json.dumps({"captions": [caption]}).encode()}
                tar.add(f"{shard:05d}{row:04d}", files)
        writer.commit(name, rows=len(jpegs), sha256=tar.sha256, content=tar.content)
    return finish(writer, {"image_size": SIDE}, PAIRS_FORMAT), np.stack(pictures)


def _first_stage(root: Path, work: Work) -> Artifact:
    """Make kl-f8 with random weights."""
    writer = ArtifactWriter("autoencoder", "autoencoder", Storage(str(root / "autoencoder")))
    torch.manual_seed(0)
    config = dataclasses.replace(presets.first_stage("kl-f8"), base_channels=work.base_channels)
    checkpoint.save(build_first_stage(config), writer.storage.path("first_stage"))
    weights = writer.commit("first_stage/model.safetensors")
    writer.commit("first_stage/config.json")
    return finish(writer, {"encoder_sha256": weights.sha256}, AUTOENCODER_FORMAT)


def _config(work: Work) -> LatentsConfig:
    on_gpu = work.device == "cuda"
    settings = {"condition": {"kind": "none"}, "batch_size": work.batch_size, "workers": work.encoders}
    fast = {"precision": "bf16", "compile": True} if on_gpu else {}
    return LatentsConfig.model_validate({**settings, **fast, "use_gpu": on_gpu})


def _ours(root: Path, pairs: Artifact, first_stage: Artifact, work: Work) -> tuple[float, float]:
    """Return the images/s of the operators of the stage, and the cores that were busy meanwhile."""
    config = _config(work)
    writer = ArtifactWriter("latents", "latents", Storage(str(root)))
    kind_of(config.condition).prepare(PairsRows(pairs), writer)
    context = StageContext(
        config=config,
        seed=0,
        writer=writer,
        upstream={},
        tracker=null_stage_tracker(),
        progress=lambda done, total, **facts: None,
        scratch=root,
    )
    items = [{"shard": record.name, "rows": record.rows, "sha256": record.sha256} for record in pairs.shards()]
    size = pool_size(len(items), workers=config.workers, use_gpu=config.use_gpu)
    in_flight = SHARDS_A_GPU if size.use_gpu else SHARDS_A_CORE
    done = []
    for _ in map_through(items, steps(context, pairs, first_stage, size), in_flight=in_flight):
        done.append((time.perf_counter(), _cpu_s()))
    assert len(writer.committed().shards()) == len(items)
    (began, cpu_before), (ended, cpu_after) = done[work.encoders - 1], done[-1]
    rate = work.rows * (len(done) - work.encoders) / (ended - began)
    return rate, (cpu_after - cpu_before) / (ended - began)


def _cpu_s() -> float:
    """Return the CPU seconds of all processes of this machine since it started, without waiting for disks."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _bare(first_stage: Artifact, pictures: np.ndarray, work: Work) -> float:
    """Return the images/s of encoders that do nothing else."""
    spawn = multiprocessing.get_context("spawn")
    begin, end = spawn.Barrier(work.encoders + 1), spawn.Barrier(work.encoders + 1)
    arguments = (first_stage, pictures, work, begin, end)
    encoders = [spawn.Process(target=_encode_bare, args=arguments) for _ in range(work.encoders)]
    for encoder in encoders:
        encoder.start()
    begin.wait()
    started = time.perf_counter()
    end.wait()
    seconds = time.perf_counter() - started
    for encoder in encoders:
        encoder.join()
    return work.rows * (work.shards - 1) * work.encoders / seconds


def _encode_bare(first_stage: Artifact, pictures: np.ndarray, work: Work, begin: Barrier, end: Barrier) -> None:
    storage = Storage(first_stage.storage.url)
    encoder = EncodeShard(first_stage=first_stage, storage=storage, config=_config(work), device=work.device)
    batches = torch.from_numpy(pictures).to(work.device).split(work.batch_size)
    encoder._encode(batches[0])
    synchronize(torch.device(work.device))
    begin.wait()
    for _ in range(work.shards - 1):
        for batch in batches:
            encoder._encode(batch)
    synchronize(torch.device(work.device))
    end.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.encode_latents", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=Work.device)
    parser.add_argument("--encoders", type=int, help="a core each, or a GPU; all by default")
    parser.add_argument("--batch-size", type=int, default=Work.batch_size, help="of a forward pass; 64 suits a GPU")
    parser.add_argument("--shards", type=int, default=Work.shards, help="for each encoder")
    parser.add_argument("--rows", type=int, default=Work.rows, help="pictures a shard")
    parser.add_argument("--base-channels", type=int, default=Work.base_channels, help="of kl-f8; 128 is published")
    options = vars(parser.parse_args(arguments))
    rounds = options.pop("rounds")
    cores, device = len(os.sched_getaffinity(0)), torch.device(options["device"])
    options["encoders"] = options["encoders"] or (torch.cuda.device_count() if device.type == "cuda" else cores)
    with connect(ClusterConfig(cpus=cores if device.type == "cuda" else max(2, options["encoders"]))):
        result = encode_vs_bare(Work(**options), rounds=rounds)
    print(dump({**result, "definitions": DEFINITIONS, "machine": machine(device)}))


if __name__ == "__main__":
    main()
