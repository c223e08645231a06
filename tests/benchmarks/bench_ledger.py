"""The ledger at scale: `python -m tests.benchmarks.bench_ledger`, `make bench-ledger`.

Roots with 10^3 to 4*10^5 shards on an S3 server on loopback that answers every request 25 ms later. Each piece of work
runs in a process of its own, in turn with a bare listing of the same objects. Prints a line a run; the last line of
stdout is one JSON object, see DEFINITIONS.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import s3fs
import torch

from tests.benchmarks.ledger_state import make_root
from tests.benchmarks.ledger_work import WORK, recipe_of
from tests.benchmarks.timing import machine
from tests.benchmarks.tool_run import dump
from tests.pipelines.store.s3 import environment
from tests.s3 import BUCKET, FastS3, fast_s3

SIZES = (1_000, 10_000, 100_000, 400_000)
# Growth is held against this many shards: below, what a run costs whatever its size counts for too much.
BASE_SIZE = 10_000
# Of which artifact the objects are listed that each piece of work is held against.
LISTED = {"plan": "listing_finished", "ls": "listing_finished", "check": "listing_finished", "resume": "listing_half"}
GOALS = {"plan_vs_listing": 1.5, "resume_vs_listing": 3.0, "driver_gib": 1.0, "growth": 1.2}
DEFINITIONS = {
    "root": "finished pairs (two files a shard), autoencoder and latents (two files a shard), and latents that are "
    "being made again, half committed; what the ledger writes itself is counted as objects",
    "plan": "what `ldm plan` does, all stages",
    "ls": "what `ldm ls` reads: all runs and artifacts",
    "check": "sizes of the files of the finished pairs, as before each stage that reads them",
    "resume": "what is committed of the latents that are being made again",
    "driver": "plan, check and resume one after the other in a process that has imported what a run imports",
    "actor": "in a process without torch: unpickle what an actor gets of pairs and latents, ask for one shard",
    "listing_*": "the objects of the finished pairs, of the unfinished latents: known pages of 1,000, 64 at once",
    "seconds": "without imports and the first connection; the median over the rounds",
    "*_vs_listing": "seconds over those of the listing of the same objects, median of the rounds' ratios, at the "
    "largest size (`by_size`: at each)",
    "driver_gib, actor_gib": "peak RSS at the largest size, with everything imported",
    "cpu_s, server_cpu_s": "of the process (of a listing with its client being made); of the server on the requests",
    "growth": "seconds at the largest size over those at 10,000 shards times the ratio of the sizes; the worst piece",
    "over_s": "given up after so long; `requests` are those until then",
}


@dataclass
class Figures:
    """All runs at one size: for each piece of work one dictionary a round; without `seconds` if it was given up."""

    shards: int
    runs: dict[str, list[dict[str, Any]]]

    def median(self, work: str, name: str = "seconds") -> float | None:
        values = [run[name] for run in self.runs[work] if name in run]
        return statistics.median(values) if values else None

    def ratio(self, work: str) -> float | None:
        """Return seconds over those of the listing: the median over the rounds."""
        rounds = zip(self.runs[work], self.runs[LISTED[work]], strict=True)
        found = [run["seconds"] / bare["seconds"] for run, bare in rounds if "seconds" in run and "seconds" in bare]
        return statistics.median(found) if found else None

    def summary(self) -> dict[str, Any]:
        """Return the last run of each piece of work, with medians in place of seconds and memory."""
        names = ("seconds", "cpu_s", "server_cpu_s", "peak_mib")
        return {"shards": self.shards} | {
            work: runs[-1] | {name: value for name in names if (value := self.median(work, name)) is not None}
            for work, runs in self.runs.items()
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all sizes and print the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_ledger", description=__doc__)
    parser.add_argument("--sizes", type=_numbers, default=SIZES, help="shards, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=25.0, help="added to every request")
    parser.add_argument("--limit-s", type=float, default=600.0, help="a piece of work that takes longer is given up")
    options = parser.parse_args(arguments)
    sizes: list[Figures] = []
    given_up: set[str] = set()
    for shards in sorted(options.sizes):
        # A server for each size: the objects of the sizes before would only take memory.
        with fast_s3() as server, tempfile.TemporaryDirectory(prefix="bench-ledger-") as scratch:
            sizes.append(measure(server, shards, Path(scratch), options, given_up))
    result = {
        "ratios": ratios(sizes),
        "goals": GOALS,
        "by_size": {each.shards: {f"{work}_vs_listing": each.ratio(work) for work in LISTED} for each in sizes},
        "growth": growth(sizes),
        "sizes": [each.summary() for each in sizes],
        "delay_ms": options.delay_ms,
        "definitions": DEFINITIONS,
        "rounds": options.rounds,
        "machine": machine(torch.device("cpu")),
    }
    print(dump(result))


def measure(server: FastS3, shards: int, scratch: Path, options: argparse.Namespace, given_up: set[str]) -> Figures:
    """Fill a root of so many shards and do every piece of work on it, in turn.

    Args:
        server: an empty one.
        shards: of the finished artifacts.
        scratch: an empty local folder.
        options: of the command.
        given_up: work that took too long at a smaller size; what takes too long at this one is added.
    """
    source = scratch / "pairs.jsonl"
    source.write_text('{"image": "a.png", "text": "a picture"}\n')
    recipe = recipe_of(f"s3://{BUCKET}/bench", str(source))
    settings = environment(server.url)
    os.environ.update(settings)
    # One server after the other: the connections to the last one are of no use.
    s3fs.S3FileSystem.clear_instance_cache()
    root = make_root(server, recipe, shards)
    command = ["--root", json.dumps(asdict(root)), "--source", str(source), "--pickled", str(scratch / "pickled")]
    runs: dict[str, list[dict[str, Any]]] = {work: [] for work in WORK}
    for _ in range(options.rounds):
        for work in WORK:
            if work in given_up or (work == "actor" and "driver" in given_up):
                runs[work].append({})
                continue
            server.set_delay(0.0)
            root.reset_half()
            server.set_delay(options.delay_ms / 1e3)
            runs[work].append(_run(server, work, command, options.limit_s))
            print(f"  {shards:7d} {work:17s} {dump(runs[work][-1])}", flush=True)
            if "over_s" in runs[work][-1]:
                given_up.add(work)
    return Figures(shards, runs)


def ratios(sizes: list[Figures]) -> dict[str, float | None]:
    """Return what the goals are about, at the largest size."""
    largest = sizes[-1]
    grown = [value for value in growth(sizes).values() if value is not None]
    driver, actor = largest.median("driver", "peak_mib"), largest.median("actor", "peak_mib")
    return {
        **{f"{work}_vs_listing": largest.ratio(work) for work in LISTED},
        "driver_gib": driver / 1024 if driver else None,
        "actor_gib": actor / 1024 if actor else None,
        "growth": max(grown) if len(grown) == len(LISTED) else None,
    }


def growth(sizes: list[Figures]) -> dict[str, float | None]:
    """Return seconds at the largest size over those at the base times as many; 1 is linear."""
    largest, base = sizes[-1], next((each for each in sizes if each.shards >= BASE_SIZE), sizes[0])
    found: dict[str, float | None] = {}
    for work in LISTED:
        much, little = largest.median(work), base.median(work)
        found[work] = much / (little * largest.shards / base.shards) if much and little else None
    return found


def _run(server: FastS3, work: str, arguments: list[str], limit_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.ledger_work", work, *arguments]
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"over_s": limit_s, "requests": server.take_figures().count}
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return figures


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))


if __name__ == "__main__":
    main()
