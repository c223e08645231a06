"""One piece of the ledger's work in a process of its own: `python -m tests.benchmarks.ledger_work`, see `bench_ledger`.

The only line of stdout is JSON: seconds and requests of the work (imports and the first connection are not counted),
and the memory of the process, which is.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.recipes import recipe_path
from pipelines.inspection.catalogue import read_catalogue
from pipelines.run.estimate import estimate
from pipelines.run.plan import plan as plan_stages
from pipelines.run.recipe import Recipe, load_recipe
from pipelines.store.ledger import Artifact, Ledger
from pipelines.store.storage import Storage
from tests.benchmarks.bare_listing import Numbered, list_objects
from tests.benchmarks.ledger_state import Root
from tests.s3 import FastS3


def recipe_of(url: str, source: str) -> Recipe:
    """Return the recipe that the root at a URL belongs to; `source` is a table of pairs."""
    return load_recipe(recipe_path("small"), (f"root={url}", f"pairs.source={source}"))


@dataclass(frozen=True)
class Task:
    """What to work on: the root, the recipe's source, and the file that holds what an actor gets."""

    root: Root
    source: str
    pickled: Path


def plan(task: Task) -> dict[str, Any]:
    """What `ldm plan` does: keys and states of all stages, and what they will cost."""
    recipe = recipe_of(task.root.url, task.source)
    walk = plan_stages(recipe)
    estimates = estimate(recipe, walk)
    assert [each.state for each in walk[:3]] == ["cached"] * 3
    return {"rows": estimates[0].rows}


def ls(task: Task) -> dict[str, Any]:
    """What `ldm ls` reads."""
    found = read_catalogue(Storage(task.root.url))
    return {"artifacts": len(found.artifacts)}


def check(task: Task) -> dict[str, Any]:
    """What is done before a stage with each artifact that it reads."""
    artifact = _pairs(task)
    artifact.check_sizes()
    return {"files": len(artifact.files)}


def resume(task: Task) -> dict[str, Any]:
    """What a stage does first when it goes on."""
    return {"files": len(task.root.half_writer().committed())}


def driver(task: Task) -> dict[str, Any]:
    """All of it, one after the other, in the process of a run; then pickle what an actor gets."""
    import pipelines.run.walk  # noqa: F401  (only here: what a run imports, Ray among it, is part of its memory)

    plan(task)
    pairs, half = _pairs(task), task.root.half_writer()
    pairs.check_sizes()
    committed = half.committed()
    pending = [record.name for record in pairs.shards() if record.name not in committed]
    pickled = pickle.dumps((pairs, half))
    task.pickled.write_bytes(pickled)
    return {"pending": len(pending), "pickled_bytes": len(pickled)}


def actor(task: Task) -> dict[str, Any]:
    """What an actor reads of the ledger for its first shard."""
    pairs, writer = pickle.loads(task.pickled.read_bytes())
    assert pairs.details == {}
    assert writer.is_committed("000000.tar")
    return {"bytes": pairs.storage.size("000000.tar")}


def listing_finished(task: Task) -> dict[str, Any]:
    """List the objects of the finished pairs."""
    return _listing(f"pairs/{task.root.keys['pairs']}", task, task.root.finished_objects)


def listing_half(task: Task) -> dict[str, Any]:
    """List the objects of the unfinished latents."""
    return _listing(f"latents/{task.root.half}", task, task.root.half_objects)


WORK: dict[str, Callable[[Task], dict[str, Any]]] = {
    each.__name__: each for each in (listing_finished, listing_half, plan, ls, check, resume, driver, actor)
}


def _listing(folder: str, task: Task, numbered: list[Numbered]) -> dict[str, Any]:
    bucket, _, prefix = f"{task.root.url}/{folder}/".removeprefix("s3://").partition("/")
    listed = list_objects(os.environ["AWS_ENDPOINT_URL"], bucket, prefix, numbered)
    return {**listed._asdict(), "by_kind": {"ListObjectsV2": listed.requests}}


def _pairs(task: Task) -> Artifact:
    artifact = Ledger(Storage(task.root.url)).find("pairs", task.root.keys["pairs"])
    assert artifact is not None
    return artifact


def _peak_mib() -> float:
    # Not `getrusage`: what it says of a process began with the memory of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    """Do one piece of work and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ledger_work", description=__doc__)
    parser.add_argument("work", choices=list(WORK))
    parser.add_argument("--root", type=json.loads, required=True, help="the fields of a ledger_state.Root as JSON")
    parser.add_argument("--source", required=True)
    parser.add_argument("--pickled", type=Path, required=True)
    options = parser.parse_args()
    task, server = (
        Task(Root(**options.root), options.source, options.pickled),
        FastS3.at(os.environ["AWS_ENDPOINT_URL"]),
    )
    # The first connection is made before the clock runs, and what a plan imports late is imported.
    Storage(task.root.url).exists("nothing")
    if options.work == "plan":
        plan_stages(recipe_of(str(task.pickled.parent / "empty"), task.source))
    before_mib = _peak_mib()
    server.take_figures()
    started, cpu_started = time.perf_counter(), time.process_time()
    found = WORK[options.work](task)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    figures = server.take_figures()
    values = {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "requests": figures.count,
        "by_kind": figures.requests,
        "most_at_once": figures.most_at_once,
        "server_cpu_s": sum(figures.seconds.values()),
        "peak_mib": _peak_mib(),
        "before_mib": before_mib,
    }
    print(json.dumps(values | found))


if __name__ == "__main__":
    main()
