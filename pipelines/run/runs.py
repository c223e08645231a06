"""The runs of a root: `ROOT/runs/RUN/` holds what each of them was asked for, did and reported.

    recipe.yaml   the resolved recipe
    run.json      state, stages with the artifacts that they stand for, MLflow run
    report.html   the report; the newest run's is also ROOT/report.html

A run that was killed or failed is continued by the next one of the same recipe. Artifacts that a run names are kept by
`ldm gc`.
"""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.errors import UserError
from pipelines.run.results import StageRow
from pipelines.store.failures import MissingFileError
from pipelines.store.ledger import LOCKS, Artifact
from pipelines.store.lock import Hold, exclusive
from pipelines.store.storage import Storage
from pipelines.store.threads import map_in_threads

RUNS = "runs"
RECIPE = "recipe.yaml"
STATE = "run.json"
REPORT = "report.html"
# Runs that are looked through for one to continue.
_RECENT = 100

State = Literal["running", "finished", "failed"]


class StageState(BaseModel):
    """What a run knows of one of its stages.

    Attributes:
        name: the stage's name.
        state: what was done, or is being done.
        key: the artifact's key.
        reference: key and growth counter of the artifact that the run stands on; None if it is not finished.
        rows, bytes, seconds: what it came to.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    state: str
    key: str
    reference: str | None = None
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0


class RunState(BaseModel):
    """Contents of `run.json`.

    Attributes:
        name: the recipe's name.
        recipe_digest: what runs of one recipe on the same contents have in common.
        state: how far it is.
        started_at, ended_at: in UTC; a run that is continued keeps its beginning.
        tracking_run: our id of its MLflow run.
        stages: what became of each stage, in order.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    recipe_digest: str
    state: State
    started_at: str
    ended_at: str | None = None
    tracking_run: str | None = None
    stages: tuple[StageState, ...] = ()


@dataclass
class Run:
    """One run, while it goes on.

    Attributes:
        root: the root it runs on.
        id: its folder's name: when it began, the recipe's name, and a few random digits.
        state: what `run.json` says.
        hold: of the driver whose run it is, which alone writes; None for whoever reads.
    """

    root: Storage
    id: str
    state: RunState
    hold: Hold | None = None

    @property
    def folder(self) -> Storage:
        return self.root / RUNS / self.id

    def record(self, row: StageRow, artifact: Artifact | None) -> None:
        """Write down what became of a stage."""
        stage = StageState(
            name=row.name,
            state=row.state,
            key=row.key,
            reference=artifact.reference if artifact else None,
            rows=row.rows,
            bytes=row.bytes,
            seconds=row.seconds,
        )
        others = tuple(each for each in self.state.stages if each.name != row.name)
        self._update(stages=(*others, stage))

    def track(self, tracking_run: str | None) -> None:
        """Write down in which MLflow run this one is logged."""
        self._update(tracking_run=tracking_run)

    def end(self, state: State) -> None:
        self._update(state=state, ended_at=_now())

    def _update(self, **changes: Any) -> None:
        changed = self.state.model_copy(update=changes)
        if changed != self.state:
            # A driver that was suspended may wake up when another one has long continued its run.
            if self.hold:
                self.hold.check()
            self.state = changed
            self.folder.write_json(STATE, self.state.model_dump(mode="json"))


@contextlib.contextmanager
def begin(root: Storage, name: str, recipe: str, digest: str) -> Iterator[Run]:
    """Begin a run, or go on with the newest one of the same recipe that was killed or failed.

    Args:
        root: the root.
        name: the recipe's name.
        recipe: the resolved recipe as YAML.
        digest: of everything that can change an output, contents of sources included.

    Raises:
        UserError: the root cannot be written, or another driver has continued the run while this one did not answer.
    """
    with contextlib.ExitStack() as stack:
        run = _continued(root, digest, stack) or _new(root, name, digest, stack)
        run.folder.write_bytes(RECIPE, recipe.encode())
        run.folder.write_json(STATE, run.state.model_dump(mode="json"))
        try:
            yield run
        except BaseException:
            # A store that is away must not hide why the run failed.
            with contextlib.suppress(UserError):
                run.end("failed")
            raise
        run.end("finished")


def all_runs(root: Storage, newest: int | None = None) -> list[Run]:
    """Return the runs of a root, the newest first; those without a readable state are left out."""
    names = sorted((root / RUNS).names(), reverse=True)[:newest]
    read = map_in_threads(lambda name: (name, _read(root / RUNS / name)), names)
    return [Run(root, name, state) for name, state in read if state is not None]


def read_state(folder: Storage) -> RunState | None:
    """Return what a run's folder says of it; None if it says nothing yet.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return RunState.model_validate(folder.read_json(STATE))
    except MissingFileError:
        return None
    except ValidationError as error:
        raise UserError(
            f"{folder.url}/{STATE} is not the state of a run ({error.errors()[0]['msg']}): it was damaged, or written "
            "by another version of ldm; remove the folder, or use that version"
        ) from error


def lock_of(root: Storage, run_id: str) -> Storage:
    """Return the folder that the driver of a run holds."""
    return root / LOCKS / f"run-{run_id}"


def _new(root: Storage, name: str, digest: str, stack: contextlib.ExitStack) -> Run:
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "run"
    run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{plain}-{uuid.uuid4().hex[:4]}"
    hold = stack.enter_context(exclusive(lock_of(root, run_id), what=f"root {root.url}"))
    return Run(root, run_id, RunState(name=name, recipe_digest=digest, state="running", started_at=_now()), hold)


def _continued(root: Storage, digest: str, stack: contextlib.ExitStack) -> Run | None:
    for run in all_runs(root, _RECENT):
        if run.state.recipe_digest == digest and run.state.state != "finished":
            try:
                hold = stack.enter_context(exclusive(lock_of(root, run.id), what=f"run {run.id} under {root.url}"))
            except UserError:
                # Its driver lives, or somebody was quicker.
                continue
            changes = {"state": "running", "ended_at": None, "stages": ()}
            return Run(root, run.id, run.state.model_copy(update=changes), hold)
    return None


def _read(folder: Storage) -> RunState | None:
    try:
        return read_state(folder)
    except UserError:
        return None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
