"""The pairs stage against img2dataset and the bare codec: `python -m tests.benchmarks.bench_pairs`, `make bench-pairs`.

Parts: `compare` (ours, img2dataset, codec, in turn; the default), `latency`, `scaling`, `psnr`. Everything is read from
one server on loopback. Prints a line a run; the last line of stdout is one JSON object, see DEFINITIONS.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.benchmarks import img2dataset_peer, load, photographs
from tests.benchmarks.codec_loop import CodecRun, run_codec
from tests.benchmarks.pairs_command import CONNECTIONS, run_ours
from tests.benchmarks.pairs_server import RunningServer, serving
from tests.benchmarks.timing import machine
from tests.benchmarks.tool_run import ToolRun, dump, write_urls

DEFAULT_PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZE = (341, 256)
TINY = (64, 64)
THREADS = (16, 32, 64, 128)
# Long enough for both processes of img2dataset to have work, short enough to try every number of threads.
SCREENING_ROWS = 2000
DEFINITIONS = {
    "vs_img2dataset_*": "ours over theirs, images per CPU-second and per second, of the whole commands as each is used",
    "*_without_startup": "the same between the first request that the server sees and the last file of the output",
    "vs_codec": "images per CPU-second, without start-up, over those of the fastest codec loop",
    "vs_codec_same_work": "over those of a codec loop that blurs before it resizes, as our stage does",
    "medians": "ratios are medians of the rounds' ratios; figures are medians over the rounds",
    "server": "its CPU time is in no ratio; a process of its own, nothing pinned: all share the cores",
}


@dataclass(frozen=True)
class Bench:
    """What every part needs.

    Attributes:
        scratch: the folder that everything is made in.
        files: the photographs that are served.
    """

    options: argparse.Namespace
    scratch: Path
    files: list[Path]

    @property
    def folder(self) -> Path:
        return self.files[0].parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part and print its JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_pairs", description=__doc__)
    parser.add_argument("--only", choices=list(PARTS), default="compare")
    parser.add_argument("--rows", type=_numbers, help="images of a run (of `scaling`: several, with commas)")
    parser.add_argument("--distinct", type=int, default=1000, help="photographs that the rows are made of")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=_numbers, default=THREADS, help="of img2dataset: tried, the fastest taken")
    parser.add_argument("--photographs", type=Path, default=DEFAULT_PHOTOGRAPHS, help="folder to make them from")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "bench-pairs")
    options = parser.parse_args(arguments)
    originals = options.photographs if options.photographs.is_dir() else None
    kind = "photographs" if originals else "rendered"
    scratch = options.scratch.resolve()
    cache = scratch / f"{kind}-{options.distinct}-{zlib.crc32(bytes(options.photographs.resolve())):08x}"
    files = photographs.make_photographs(cache, originals, options.distinct)
    kilobytes = statistics.mean(path.stat().st_size for path in files) / 1e3
    print(f"{len(files)} {kind}, {kilobytes:.0f} kB each", flush=True)
    result = PARTS[options.only](Bench(options, scratch, files))
    pictures = {
        "kind": kind,
        "distinct": len(files),
        "kilobytes": kilobytes,
        "note": "every URL is one of them with a comment of its own",
    }
    print(dump({"part": options.only, **result, "pictures": pictures, "machine": machine(torch.device("cpu"))}))


def compare(bench: Bench) -> dict[str, Any]:
    """Measure ours, img2dataset and the codec on the same photographs, in turn."""
    rows = bench.options.rows[0] if bench.options.rows else 6000
    peer = img2dataset_peer.environment(bench.scratch)
    with serving(bench.folder) as server:
        ceiling = load.capacity(server)
        urls = write_urls(bench.scratch / "urls.parquet", server, rows)
        threads = _best_threads(bench, peer, server) if peer else None
        ours: list[ToolRun] = []
        theirs: list[ToolRun] = []
        codec: list[CodecRun] = []
        same_work: list[CodecRun] = []
        for _ in range(bench.options.rounds):
            ours.append(_shown("ours", run_ours(urls, bench.scratch / "ours", server, rows=rows, size=SIZE)))
            if peer and threads:
                run = img2dataset_peer.run_peer(
                    peer, urls, bench.scratch / "img2dataset", server, rows=rows, size=SIZE, threads=threads
                )
                theirs.append(_shown("img2dataset", run))
            for name, runs, antialias in (("codec", codec, False), ("same work", same_work, True)):
                runs.append(run_codec(bench.files, rows, SIZE[1], antialias=antialias))
                print(f"  {name:12s} {dump(runs[-1].figures())}", flush=True)
    return {
        "ratios": ratios(ours, theirs, codec, same_work),
        "ours": _medians([run.figures() for run in ours])
        | {"connections": CONNECTIONS, "processes": ours[-1].busiest()},
        "img2dataset": _medians([run.figures() for run in theirs])
        | {"threads": threads, "versions": img2dataset_peer.versions(peer) if peer else None},
        "codec": _medians([run.figures() for run in codec]),
        "codec_same_work": _medians([run.figures() for run in same_work]),
        "server": {
            "capacity_requests_per_s": ceiling.requests_per_s,
            "capacity_mb_per_s": ceiling.requests_per_s * ceiling.bytes / ceiling.requests / 1e6,
            "capacity_cpu_us_per_request": ceiling.cpu_us_per_request,
        },
        "definitions": DEFINITIONS,
        "rounds": bench.options.rounds,
    }


def ratios(
    ours: list[ToolRun], theirs: list[ToolRun], codec: list[CodecRun], same_work: list[CodecRun]
) -> dict[str, float | None]:
    """Return ours over theirs, the median over rounds; None if the peer was not run."""
    own = [run.figures() for run in ours]
    peer = [run.figures() for run in theirs]
    bare, same = [run.figures() for run in codec], [run.figures() for run in same_work]
    return {
        "vs_img2dataset_cpu": _ratio(own, peer, "images_per_cpu_s"),
        "vs_img2dataset_wall": _ratio(own, peer, "images_per_s"),
        "vs_codec": _ratio(own, bare, "work_images_per_cpu_s", "images_per_cpu_s"),
        "vs_img2dataset_cpu_without_startup": _ratio(own, peer, "work_images_per_cpu_s"),
        "vs_img2dataset_wall_without_startup": _ratio(own, peer, "work_images_per_s"),
        "vs_codec_same_work": _ratio(own, same, "work_images_per_cpu_s", "images_per_cpu_s"),
        "vs_codec_wall": _ratio(own, bare, "work_images_per_s", "images_per_s"),
    }


def latency(bench: Bench) -> dict[str, Any]:
    """Measure ours on a server that answers at once and on one that takes 200 ms, with more and more connections."""
    rows = bench.options.rows[0] if bench.options.rows else 6000
    found: dict[str, list[float]] = {}
    for _ in range(bench.options.rounds):
        for connections in (128, 512):
            for latency_ms in (0, 200):
                with serving(bench.folder, latency_s=latency_ms / 1e3) as server:
                    urls = write_urls(bench.scratch / "urls.parquet", server, rows)
                    run = run_ours(urls, bench.scratch / "ours", server, rows=rows, size=SIZE, connections=connections)
                name = f"{latency_ms} ms, {connections} connections"
                found.setdefault(name, []).append(rows / _shown(name, run).work_s)
    medians = {name: statistics.median(values) for name, values in found.items()}
    kept = {f"{n}": medians[f"200 ms, {n} connections"] / medians[f"0 ms, {n} connections"] for n in (128, 512)}
    return {"ratios": {"throughput_at_200_ms_by_connections": kept}, "images_per_s": medians}


def scaling(bench: Bench) -> dict[str, Any]:
    """Measure ours on ever longer tables of one tiny picture: rate, and the memory of driver and workers."""
    folder = bench.scratch / "tiny"
    folder.mkdir(exist_ok=True)
    with Image.open(bench.files[0]) as image:
        image.resize(TINY).save(folder / "0.jpg", quality=85)
    sizes = []
    with serving(folder) as server:
        for rows in bench.options.rows or (1_000, 10_000, 100_000, 1_000_000):
            urls = write_urls(bench.scratch / "urls.parquet", server, rows)
            run = _shown(f"{rows} rows", run_ours(urls, bench.scratch / "ours", server, rows=rows, size=TINY))
            sizes.append({"rows": rows, **run.figures(), **_memory(run)})
    return {"sizes": sizes}


def psnr(bench: Bench) -> dict[str, Any]:
    """Compare scaled decoding with full decoding, on the photographs served and on those they were made from."""
    from tests.benchmarks.scaled_decoding import psnr_by_scale

    served = [path.read_bytes() for path in bench.files[: bench.options.rows[0] if bench.options.rows else 300]]
    result = {"served": psnr_by_scale(served, SIZE[1])}
    for name in ("coco_cc", "pixabay_cc0"):
        originals = [path.read_bytes() for path in sorted((bench.options.photographs / name).rglob("*.jpg"))]
        if originals:
            result[name] = psnr_by_scale(originals, SIZE[1])
    return {"psnr": result}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "compare": compare,
    "latency": latency,
    "scaling": scaling,
    "psnr": psnr,
}


def _best_threads(bench: Bench, peer: Path, server: RunningServer) -> int:
    """Return the number of threads a process with which img2dataset does most images a second."""
    if len(bench.options.threads) == 1:
        return int(bench.options.threads[0])
    urls = write_urls(bench.scratch / "screening.parquet", server, SCREENING_ROWS)
    output = bench.scratch / "img2dataset"
    rates = {}
    for threads in bench.options.threads:
        run = img2dataset_peer.run_peer(peer, urls, output, server, rows=SCREENING_ROWS, size=SIZE, threads=threads)
        rates[threads] = SCREENING_ROWS / _shown(f"{threads} threads", run).work_s
    return int(max(rates, key=lambda threads: rates[threads]))


def _memory(run: ToolRun) -> dict[str, Any]:
    """Return peak MiB of the driver and of the largest process that Ray started for it, and name them all."""
    driver = next(each for each in run.tree.processes if "jobs.cli" in each.name)
    workers = [each.peak_rss_bytes for each in run.tree.processes if each.name.startswith("ray::")]
    return {
        "driver_mib": driver.peak_rss_bytes / 2**20,
        "largest_worker_mib": max(workers) / 2**20,
        "processes": run.busiest(),
    }


def _shown(name: str, run: ToolRun) -> ToolRun:
    print(f"  {name:12s} {dump(run.figures())}", flush=True)
    return run


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str, other: str = "") -> float | None:
    if not theirs:
        return None
    return statistics.median(own[name] / their[other or name] for own, their in zip(ours, theirs, strict=True))


def _medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]} if rounds else {}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))


if __name__ == "__main__":
    main()
