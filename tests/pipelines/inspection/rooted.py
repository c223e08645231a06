"""Roots with runs and artifacts, written by the ledger's own code."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from pipelines.run.results import StageRow
from pipelines.run.runs import begin
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import LOCKS, SUPERSEDED, TRACKING, Artifact, Ledger
from pipelines.store.storage import Storage

DAY_S = 86_400


class StoppedError(Exception):
    """What ends a run that fails."""


def make_root(url: str) -> Ledger:
    ledger = Ledger(Storage(url))
    ledger.mark_version()
    return ledger


def begun(ledger: Ledger, stage: str, key: str, shards: int = 2) -> ArtifactWriter:
    """Commit some shards of ten rows and a hundred bytes, as a stage that is not finished."""
    writer = ArtifactWriter(stage, key, ledger.storage(stage, key))
    writer.storage.write_json(TRACKING, {"run_id": None})
    for number in range(shards):
        writer.storage.write_bytes(f"{number:06d}.tar", bytes(100))
        writer.commit(f"{number:06d}.tar", rows=10)
    return writer


def finished(
    ledger: Ledger,
    stage: str,
    key: str,
    upstream: dict[str, str] | None = None,
    details: dict[str, Any] | None = None,
) -> Artifact:
    begun(ledger, stage, key).finish(
        format_version=1,
        config={},
        identity={},
        upstream=upstream or {},
        details=details or {},
        seconds=1.0,
        code_version="test",
    )
    return Artifact(stage, key, ledger.storage(stage, key))


def superseded(ledger: Ledger, stage: str, key: str, upstream: dict[str, str] | None = None) -> Artifact:
    artifact = finished(ledger, stage, key, upstream)
    artifact.storage.write_json(SUPERSEDED, {"by": f"{key}-2"})
    return artifact


def a_run(ledger: Ledger, *artifacts: Artifact, begins: tuple[str, str] | None = None) -> str:
    """Begin a run that stands on artifacts, and end it; it fails while it makes what it `begins`."""
    digest = f"{[each.key for each in artifacts]} {begins} {time.time_ns()}"
    run_id = ""
    try:
        with begin(ledger.root, "small", "name: small\n", digest) as run:
            run_id = run.id
            for artifact in artifacts:
                run.record(StageRow(artifact.stage, "cached", artifact.key), artifact)
            if begins:
                run.record(StageRow(begins[0], "run", begins[1]), None)  # type: ignore[arg-type]
                raise StoppedError
    except StoppedError:
        pass
    return run_id


def age(folder: Path, days: float) -> None:
    """Set the times of all files below a local folder back."""
    when = time.time() - days * DAY_S
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (when, when))


def objects(root: Storage) -> set[str]:
    """Return the paths of all files of a root except its locks."""
    return {name for name in root.files_below() if not name.startswith(LOCKS)}
