"""Run the stages in order: skip the cached ones, resume what was begun, run the rest.

pairs -> autoencoder -> latents -> diffusion -> evaluate -> export
"""

import contextlib
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines import __version__
from pipelines.compute.cluster import connect
from pipelines.config import Config
from pipelines.errors import UserError, explain
from pipelines.notices import told_to
from pipelines.run.plan import STAGES, PlannedStage, Selection, plan, plan_stage
from pipelines.run.recipe import Recipe
from pipelines.run.report import build_report
from pipelines.run.results import RunObserver, RunResult, StageRow
from pipelines.stage import Progress, Stage, StageContext
from pipelines.store.ledger import Artifact, ArtifactWriter, Ledger, artifact_key, digest_json
from pipelines.store.lock import Hold, exclusive
from pipelines.store.storage import Storage
from pipelines.tracking import StageTracker, Tracker, store

REPORT = "report.html"
# Which MLflow run an unfinished pipeline run, and an unfinished stage, go on in.
UNFINISHED = "unfinished.json"
TRACKING = "tracking.json"


def run(
    recipe: Recipe,
    selection: Selection | None = None,
    observer: RunObserver | None = None,
    *,
    debug: bool = False,
) -> RunResult:
    """Walk the stages; every one is `cached`, `resumed`, `retried`, `run` or `skipped` afterwards.

    Args:
        recipe: what to run.
        selection: which stages; all of the recipe's by default.
        observer: told what happens.
        debug: show Ray's own log.

    Raises:
        UserError: what a person can mend, on one line; what is committed stays.
    """
    started = time.monotonic()
    root = Storage(recipe.root)
    # Said before the first stage runs: whatever is wrong with any stage's section or inputs.
    stages = tuple(planned.stage for planned in plan(recipe, selection))
    observer = observer or RunObserver()
    with told_to(observer.notice), exclusive(root) as hold:
        walk = _Walk(recipe, selection or Selection(), observer, debug, root, hold, stages)
        result = walk.run()
    result.wall_s = round(time.monotonic() - started, 3)
    return result


@dataclass
class _Walk:
    """One run, while this process holds the root."""

    recipe: Recipe
    selection: Selection
    observer: RunObserver
    debug: bool
    root: Storage
    hold: Hold
    stages: tuple[Stage[Any], ...]
    tracker: Tracker | None = None
    rows: list[StageRow] = field(default_factory=list)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def run(self) -> RunResult:
        tracking = self.recipe.tracking
        uri = store(tracking, self.root)[0] if tracking.enabled else None
        result = RunResult(self.root.url, self.rows, self.artifacts, uri)
        with contextlib.ExitStack() as stack:
            try:
                self._walk(stack)
            except BaseException:
                self._finish_tracking("FAILED", result)
                raise
            if self.tracker is None and self._unfinished():
                # Killed between the last stage and the report: both are still due.
                self.tracker = self._start_tracking()
            result.report = self._report()
            self._finish_tracking("FINISHED", result)
        return result

    def _walk(self, stack: contextlib.ExitStack) -> None:
        ledger = Ledger(self.root)
        for stage in self.stages:
            self.hold.check()
            # Planned again: a stage that ran since may have settled on another key, and hours later a vocabulary or a
            # file of prompts may be another one. What has not changed is remembered, not digested again.
            planned = plan_stage(self.recipe, ledger, stage, self.keys, self.selection)
            self.keys[stage.name] = planned.reference
            if planned.state in ("cached", "skipped"):
                self._record(planned, planned.artifact, 0.0)
                continue
            self._check_upstream(stage)
            if self.tracker is None:
                self.tracker = self._start_tracking()
                stack.enter_context(connect(self.recipe.cluster, debug=self.debug))
            self._run_stage(ledger, planned, self.tracker)

    def _check_upstream(self, stage: Stage[Any]) -> None:
        for name in stage.upstream:
            if name not in self.artifacts:
                raise UserError(
                    f"{stage.name} needs {name}, which is not finished (key {self.keys[name]}): "
                    f"run it first, for example with --to {stage.name}"
                )
            self.artifacts[name].check_sizes()

    def _run_stage(self, ledger: Ledger, planned: PlannedStage, tracker: Tracker) -> None:
        stage, storage = planned.stage, ledger.storage(planned.stage.name, planned.key)
        self.observer.begin(planned)
        # Whoever wrote them is dead: the root is ours, and this stage has no worker yet.
        storage.remove_leftovers()
        started = time.monotonic()
        writer = ArtifactWriter(stage.name, planned.key, storage)
        count = _Count(stage.name, self.observer)
        stage_tracker = self._track_stage(tracker, planned, storage)
        details = self._call(planned, writer, count, stage_tracker)
        seconds = time.monotonic() - started
        # A driver that slept too long was taken for dead: another one makes this artifact now, and it is not ours to
        # finish.
        self.hold.check()
        artifact = self._finish(ledger, planned, writer, details, seconds)
        stage_tracker.finish("FINISHED")
        self.keys[stage.name] = artifact.reference
        self._record(planned, artifact, seconds, count.worked)

    def _call(
        self, planned: PlannedStage, writer: ArtifactWriter, progress: Progress, tracker: StageTracker
    ) -> dict[str, Any]:
        """Call the stage's `run`; return the manifest's details."""
        stage = planned.stage
        try:
            with tempfile.TemporaryDirectory(prefix=f"ldm-{stage.name}-") as scratch:
                details = stage.run(
                    StageContext(
                        config=planned.config,
                        seed=self.recipe.seed,
                        writer=writer,
                        upstream={name: self.artifacts[name] for name in stage.upstream},
                        tracker=tracker,
                        progress=progress,
                        scratch=Path(scratch),
                        existing=planned.artifact,
                        check=self.hold.check,
                    )
                )
        except BaseException as error:
            tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
            if isinstance(error, Exception) and not isinstance(error, UserError) and (known := explain(error)):
                raise known from error
            raise
        return details

    def _finish(
        self, ledger: Ledger, planned: PlannedStage, writer: ArtifactWriter, details: dict[str, Any], seconds: float
    ) -> Artifact:
        """Write the manifest; return the artifact that stands for the stage from now on."""
        stage = planned.stage
        writer.finish(
            format_version=stage.format_version,
            config=planned.config.model_dump(mode="json"),
            identity=planned.identity,
            upstream={name: self.keys[name] for name in stage.upstream},
            details=details,
            seconds=seconds,
            code_version=__version__,
        )
        artifact = ledger.find(stage.name, planned.key)
        assert artifact is not None
        return artifact if planned.state == "retried" else self._settle(ledger, planned, artifact)

    def _settle(self, ledger: Ledger, planned: PlannedStage, artifact: Artifact) -> Artifact:
        """Compare a forced re-run with the generation before it; return the artifact that stays current."""
        if generation := planned.identity.get("generation", 0):
            before = {**planned.identity, "generation": generation - 1}
            if generation == 1:
                # The first one was made without --force, and its key without a generation.
                before.pop("generation")
            if old := ledger.find(planned.stage.name, artifact_key(before)):
                return ledger.supersede(old, artifact, logs=planned.stage.logs)
        return artifact

    def _record(self, planned: PlannedStage, artifact: Artifact | None, seconds: float, worked: int = 0) -> None:
        stage = planned.stage
        row = StageRow(
            stage.name, planned.state, planned.key, seconds=round(seconds, 3), worked=worked, unit=stage.unit
        )
        if artifact:
            self.artifacts[stage.name] = artifact
            row.key, row.rows, row.bytes = artifact.key, artifact.manifest.rows, artifact.manifest.bytes
        self.rows.append(row)
        self.observer.end(row)

    def _start_tracking(self) -> Tracker:
        """Begin the MLflow run of this pipeline run, or go on in the one that a killed or failed run began."""
        spool = Path(self.root.path() if self.root.is_local else ".") / ".tracking"
        tracker = Tracker(self.recipe.tracking, self.root, spool)
        values = self.recipe.resolved()
        tracker.start_pipeline(self.recipe.name, values, {"ldm.root": self.root.url}, resume_run_id=self._unfinished())
        if tracker.run_id:
            self.root.write_json(UNFINISHED, {"run_id": tracker.run_id, "recipe": self._digest})
        return tracker

    @property
    def _digest(self) -> str:
        return digest_json({name: section.identity() for name, section in self.recipe if isinstance(section, Config)})

    def _unfinished(self) -> str | None:
        """Return the MLflow run of a pipeline run of this recipe that was killed or failed."""
        begun = self.root.read_json(UNFINISHED) if self.root.exists(UNFINISHED) else {}
        return begun.get("run_id") if begun.get("recipe") == self._digest else None

    @staticmethod
    def _track_stage(tracker: Tracker, planned: PlannedStage, storage: Storage) -> StageTracker:
        begun = storage.read_json(TRACKING) if storage.exists(TRACKING) else {}
        stage_tracker = tracker.stage(planned.stage.name, planned.key, resume_run_id=begun.get("run_id"))
        if not begun:
            stage_tracker.params(planned.identity["config"])
            storage.write_json(TRACKING, {"run_id": stage_tracker.run_id})
        return stage_tracker

    def _finish_tracking(self, status: Literal["FINISHED", "FAILED"], result: RunResult) -> None:
        if self.tracker:
            if status == "FINISHED":
                self.root.remove(UNFINISHED)
                self.tracker.pipeline.metrics(_headlines(self.artifacts))
            self.tracker.finish(status)
            self.tracker.close()
            result.run_id = self.tracker.run_id

    def _report(self) -> str | None:
        if not self.artifacts:
            return None
        # With everything cached the page would say the same, but for a table of what this run did: nothing.
        if self.tracker or not self.root.exists(REPORT):
            html = build_report(self.root, self.recipe.to_yaml(), self.rows, self.artifacts)
            self.root.write_bytes(REPORT, html.encode())
        if self.tracker:
            with self.root.local_copy(REPORT) as path:
                self.tracker.pipeline.artifact(path)
        return f"{self.root.url}/{REPORT}"


class _Count:
    """Pass a stage's progress on to the observer, and count what this run has worked on."""

    def __init__(self, name: str, observer: RunObserver) -> None:
        self._name, self._observer = name, observer
        self._first: int | None = None
        self._last = 0

    def __call__(self, done: int, total: int, **facts: str) -> None:
        # What an earlier run has done is in the first report.
        self._first = done if self._first is None else min(self._first, done)
        self._last = done
        self._observer.progress(self._name, done, total, **facts)

    @property
    def worked(self) -> int:
        return self._last - self._first if self._first is not None else 0


def _headlines(artifacts: dict[str, Artifact]) -> dict[str, float]:
    """Return the figures that the pipeline's own MLflow run shows, so that runs can be compared in one table."""
    return {
        f"{stage.name}/{key}": float(artifacts[stage.name].details[key])
        for stage in STAGES
        for key in stage.headlines
        if stage.name in artifacts and artifacts[stage.name].details.get(key) is not None
    }
