"""Encoding latents and reading them, the latter against webdataset, streaming and Ray Data: `make bench-latents`.

Reading is from the page cache. The readers run in turn, each in a process of its own; then what our loader costs the
training process, several training processes at once, and artifacts of up to 4*10^5 shards. Before that the PARTS that
are programs of their own. Prints a line a run; the last line of stdout is one JSON object, see DEFINITIONS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.store.ledger import Artifact
from tests.benchmarks.latents_data import RAW_BYTES, folder_bytes, make_large, make_latents, source_of
from tests.benchmarks.latents_readers import streaming_python
from tests.benchmarks.timing import machine
from tests.benchmarks.tool_run import dump

PEERS = ("webdataset", "streaming", "ray_data")
# Timed epochs of a run. Of ours more: else it would end before the clocks tell much.
OURS_EPOCHS, EPOCHS = 8, 2
SIZES = (100, 10_000, 400_000)
LARGE_ROWS = 2_600
POSITION = 10**9
# Their ratio, and the module that measures it.
PARTS = {
    "encode_vs_bare": "encode_latents",
    "bytes_per_node": "node_bytes",
    "cached_vs_online": "cached_online",
}
GOALS = {
    "encode_vs_bare": 0.92,
    "bytes_per_node": 1.1,
    "cached_vs_online": 1.4,
    "read_vs_best_peer": 2.0,
    "main_thread_ms_per_1000": 5.0,
    "resume_s": 2.0,
    "memory_growth": 1.1,
    "overhead": 0.15,
}
DEFINITIONS = {
    "parts": "each with its own definitions: python -m tests.benchmarks.MODULE",
    "sample": "moments (2, 4, 32, 32) fp16 and 77 token ids, of incompressible bytes; batches of 256 as tensors",
    "samples_per_s": "of whole epochs after the first: neither opening nor what was read ahead counts; medians",
    "ours": "CRC-32 of every byte, timestep, caption and dropout drawn, resumable at any step; in the thread that asks",
    "webdataset": "the same tars, json not read; 4,000 samples of shuffle buffer; no checksum, no resume",
    "streaming": "MDS, py1e shuffle over blocks of 4,000, a DataLoader in this process; no checksum",
    "ray_data": "Parquet of raw bytes, one core, files and a buffer of 4,000 shuffled; its reader is another process",
    "read_vs_best_peer": "samples_per_s over those of the fastest peer, median of the rounds' ratios",
    "read_vs_best_peer_cpu": "the same of samples per CPU second of the reading process (not of Ray's)",
    "quality.displacement": "mean distance of a sample's place in an epoch from that in the data; 1: a perfect shuffle",
    "quality.neighbours": "share of neighbours in the data that come in one batch, over that of a perfect shuffle",
    "main_thread_ms_per_1000": "time of the training process's thread in the loader, batches of 64 from one process",
    "consumers": "8 training processes at once, batches of 64, each with one process that makes its batches",
    "memory": "of a process that opens an artifact and makes a batch; own: without files that are mapped",
    "memory_growth": "own memory at the most shards over that at the fewest",
    "resume_s": "opening an artifact of 4*10^5 shards and 1.04*10^9 samples, and the batch at sample 10^9",
    "overhead": "tars and indexes over the bytes of the arrays, less one; a json of some 90 bytes with each sample",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_latents", description=__doc__)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1024, help="samples of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=lambda text: tuple(filter(None, text.split(","))), default=PEERS)
    parser.add_argument("--parts", type=lambda text: tuple(filter(None, text.split(","))), default=tuple(PARTS))
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--consumers", type=int, default=8, help="training processes at once")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "bench-latents")
    options = parser.parse_args(arguments)
    options.scratch.mkdir(parents=True, exist_ok=True)
    parts = {name: _part(name) for name in options.parts}
    with tempfile.TemporaryDirectory(prefix="data-", dir=options.scratch) as folder:
        result = measure(Path(folder), options)
    result["ratios"] |= {name: part[name] for name, part in parts.items()}
    result["parts"] = parts
    print(dump({**result, "goals": GOALS, "definitions": DEFINITIONS, "machine": machine(torch.device("cpu"))}))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    count = options.shards * options.rows
    make_latents(folder / "ours", options.shards, options.rows)
    interpreters = {name: Path(sys.executable) for name in ("ours", *options.peers)}
    if "streaming" in options.peers:
        found = streaming_python(options.scratch)
        interpreters = {name: python for name, python in interpreters.items() if found or name != "streaming"}
        if found:
            interpreters["streaming"] = found
            _read(found, "write_mds", folder, "--samples", count)
    if "ray_data" in options.peers:
        _read(Path(sys.executable), "write_parquet", folder, "--samples", count, "--epoch", options.rows)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in interpreters}
    for number in range(options.rounds):
        # Each round in the other direction.
        for name in list(interpreters)[:: 1 if number % 2 == 0 else -1]:
            samples = count * (OURS_EPOCHS if name == "ours" else EPOCHS)
            run = _read(interpreters[name], name, folder, "--samples", samples, "--epoch", count)
            assert run is not None
            order = run.pop("order")
            runs[name].append(run | {"quality": quality(order, count, 256)})
            print(f"  {name:12s} {dump(runs[name][-1])}", flush=True)
    loader = [_loader("main_thread", folder / "ours", "--samples", 16 * 1024) for _ in range(options.rounds)]
    print(f"  {'main thread':12s} {dump(loader[-1])}", flush=True)
    consumers = _consumers(folder / "ours", options.consumers)
    print(f"  {'consumers':12s} {dump(consumers)}", flush=True)
    sizes = {shards: _size(folder / f"large-{shards}", shards, options.rows) for shards in options.sizes}
    bytes_per_sample = layouts(folder, count)
    return {
        "ratios": ratios(runs, loader, list(sizes.values()), bytes_per_sample),
        "readers": {name: summary(each) for name, each in runs.items()},
        "loader": {name: statistics.median(run[name] for run in loader) for name in loader[0]},
        "consumers": consumers,
        "sizes": sizes,
        "bytes_per_sample": bytes_per_sample,
        "samples": count,
        "rounds": options.rounds,
    }


def quality(order: Sequence[int], count: int, batch_size: int) -> dict[str, float]:
    """Return how well an order mixes the samples 0 to `count` - 1; see DEFINITIONS."""
    place = {number: position for position, number in enumerate(order)}
    displacement = statistics.fmean(abs(number - position) for position, number in enumerate(order))
    pairs = [(place[number], place[number + 1]) for number in place if number + 1 in place]
    together = statistics.fmean(first // batch_size == second // batch_size for first, second in pairs)
    return {"displacement": displacement / (count / 3), "neighbours": together / (batch_size / count)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the rounds."""
    return {
        "samples_per_s": statistics.median(run["samples"] / run["seconds"] for run in runs),
        "samples_per_cpu_s": statistics.median(run["samples"] / run["cpu_s"] for run in runs),
        "first_batch_s": statistics.median(run["first_batch_s"] for run in runs),
        "peak_mib": statistics.median(run["peak_mib"] for run in runs),
        "quality": {
            name: statistics.median(run["quality"][name] for run in runs) for name in ("displacement", "neighbours")
        },
    }


def ratios(
    runs: dict[str, list[dict[str, Any]]],
    loader: list[dict[str, Any]],
    sizes: list[dict[str, Any]],
    bytes_per_sample: dict[str, float],
) -> dict[str, float | None]:
    """Return what the goals are about."""

    def against_best(seconds: str) -> float | None:
        rounds = zip(*runs.values(), strict=True)
        speeds = [[run["samples"] / run[seconds] for run in each] for each in rounds]
        return statistics.median(ours / max(peers) for ours, *peers in speeds) if len(runs) > 1 else None

    return {
        "read_vs_best_peer": against_best("seconds"),
        "read_vs_best_peer_cpu": against_best("cpu_s"),
        "main_thread_ms_per_1000": statistics.median(run["main_thread_ms_per_1000"] for run in loader),
        "resume_s": sizes[-1]["seconds"],
        "memory_growth": sizes[-1]["own_mib"] / sizes[0]["own_mib"],
        "overhead": bytes_per_sample["ours"] / bytes_per_sample["arrays"] - 1,
    }


def layouts(folder: Path, count: int) -> dict[str, float]:
    """Return the bytes that a sample takes in each layout that was written."""
    found = {"arrays": float(RAW_BYTES), "ours": folder_bytes(folder / "ours", ".tar", ".arrow") / count}
    for name in ("mds", "parquet"):
        if (folder / name).exists():
            found[name] = folder_bytes(folder / name) / count
    return found


def _part(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{PARTS[name]}"], stdout=subprocess.PIPE, check=True, text=True
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {name:17s} {dump(figures[name])}", flush=True)
    return figures


def _read(python: Path, reader: str, folder: Path, *arguments: object) -> dict[str, Any] | None:
    command = [str(python), "-m", "tests.benchmarks.latents_readers", reader, str(folder), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{reader} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"samples"')]
    return json.loads(lines[-1]) if lines else None


def _command(work: str, artifact: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.latents_loader", work, str(artifact), *map(str, arguments)]


def _loader(work: str, artifact: Path, *arguments: object) -> dict[str, Any]:
    done = subprocess.run(_command(work, artifact, *arguments), stdout=subprocess.PIPE, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _consumers(artifact: Path, count: int) -> dict[str, Any]:
    """Run several training processes at once, each with its rank's part of global batches."""
    common = ("--samples", 16 * 1024, "--world-size", count)
    commands = [_command("main_thread", artifact, *common, "--rank", rank) for rank in range(count)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    runs = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    total, cores = sum(run["samples_per_s"] for run in runs), len(os.sched_getaffinity(0))
    return {
        "processes": count,
        "cores": cores,
        "samples_per_s": total,
        "samples_per_s_a_core": total / cores,
        "cpu_ms_per_1000": statistics.median(
            run["process_cpu_ms_per_1000"] + run["main_thread_ms_per_1000"] for run in runs
        ),
        "main_thread_ms_per_1000": statistics.median(run["main_thread_ms_per_1000"] for run in runs),
    }


def _size(folder: Path, shards: int, rows: int) -> dict[str, Any]:
    """Open an artifact of so many shards, of which the shards of one batch are there; a billion samples if it can."""
    rows = LARGE_ROWS if shards * LARGE_ROWS > POSITION else rows
    position = min(POSITION, shards * rows - 64)

    def used(artifact: Artifact) -> set[int]:
        order = source_of(artifact, batch_size=64).open().order
        return {sample.shard for sample in order.slice(position // 64, 0, 1)}

    artifact = make_large(folder, shards, rows, used)
    figures = _loader("first_batch", Path(artifact.storage.url), "--position", position)
    print(f"  {shards:7d} shards {dump(figures)}", flush=True)
    return {"samples": shards * rows, **figures}


if __name__ == "__main__":
    main()
