"""`ldm ls`: list the runs and artifacts of a root."""

from __future__ import annotations

import dataclasses
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from jobs.console import console, emit_json, json_option
from pipelines.drawing.formatting import format_age, format_bytes

if TYPE_CHECKING:
    from pipelines.inspection.catalogue import ArtifactFacts, RunFacts

STYLES = {"running": "cyan", "being made": "cyan", "failed": "red", "killed": "red", "superseded": "dim"}
# Names of users of an artifact that are shown.
_SHOWN = 3


@click.command()
@click.argument("root")
@json_option
def ls(root: str, as_json: bool) -> None:
    """List the runs and artifacts under ROOT.

    Of an object store that does not tell the time nobody can say at once whether a driver lives: `running?`.

    \b
    Example:
      ldm ls runs/demo
      ldm ls s3://bucket/run --json
    """
    # Here, because `ldm ls --help` needs no pyarrow.
    from pipelines.inspection.catalogue import open_root, read_catalogue

    storage = open_root(root).root
    catalogue = read_catalogue(storage)
    artifacts = [each for each in catalogue.artifacts if each.condition != "deleted"]
    out = console(as_json)
    if not catalogue.runs and not artifacts:
        out.print(f"no runs and no artifacts under {storage.url}", markup=False)
    if catalogue.runs:
        out.print(_runs(catalogue.runs), soft_wrap=False)
    if artifacts:
        out.print(*([] if not catalogue.runs else [""]), _artifacts(artifacts), sep="\n", soft_wrap=False)
    if as_json:
        emit_json(
            {
                "root": storage.url,
                "runs": [_run_json(run) for run in catalogue.runs],
                "artifacts": [_artifact_json(artifact) for artifact in artifacts],
            }
        )


def _runs(runs: list[RunFacts]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("run", "recipe", "state", "when", "stages"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("run", "state", "when"))
    for run in runs:
        since = datetime.fromisoformat(run.state.started_at).timestamp()
        # A stage without a reference was begun, and not finished.
        stages = ", ".join(each.name if each.reference else f"{each.name} …" for each in run.state.stages)
        table.add_row(
            run.id,
            Text(run.state.name),
            Text(run.condition, STYLES.get(run.condition, "")),
            f"{format_age(time.time() - since)} ago",
            stages,
        )
    return table


def _artifacts(artifacts: list[ArtifactFacts]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("stage", "key", "state", "rows", "bytes", "age", "used by"):
        right = heading in ("rows", "bytes", "age")
        wraps = heading in ("state", "used by")
        table.add_column(heading, justify="right" if right else "left", no_wrap=not wraps, overflow="fold")
    for each in artifacts:
        manifest = each.manifest
        table.add_row(
            each.stage,
            each.key,
            Text(_state(each), STYLES.get(each.condition, "")),
            f"{manifest.rows:,}" if manifest and manifest.rows else "",
            format_bytes(manifest.bytes) if manifest else "",
            "" if each.since is None else format_age(time.time() - each.since),
            ", ".join(map(_short, each.used_by[:_SHOWN]))
            + (f" and {more} more" if (more := len(each.used_by) - _SHOWN) > 0 else ""),
        )
    return table


def _short(user: str) -> str:
    """Shorten the name of a run by its time, and the key of an artifact: whole, they are lines of their own."""
    kind, _, name = user.partition(" ")
    return f"{kind} {name.split('-', 2)[-1] if kind == 'run' else name[:4]}"


def _state(artifact: ArtifactFacts) -> str:
    if artifact.holder is None or not artifact.condition.startswith("being made"):
        return artifact.condition
    progress = artifact.holder.progress
    how_far = f": {progress['done']:,} of {progress['total']:,}" if progress.get("total") else ""
    return f"{artifact.condition} by {artifact.holder.name}{how_far}"


def _run_json(run: RunFacts) -> dict[str, Any]:
    return {"id": run.id, **run.state.model_dump(mode="json"), "state": run.condition}


def _artifact_json(artifact: ArtifactFacts) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "stage": artifact.stage,
        "key": artifact.key,
        "state": artifact.condition,
        "rows": manifest.rows if manifest else None,
        "bytes": manifest.bytes if manifest else None,
        "files": manifest.files if manifest else None,
        "since": artifact.since,
        "upstream": dict(manifest.upstream) if manifest else {},
        "used_by": list(artifact.used_by),
        "holder": dataclasses.asdict(artifact.holder) if artifact.holder else None,
    }
