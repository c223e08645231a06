"""The walk over the stages: what is cached stays, what was begun goes on, the rest runs.

pairs -> autoencoder -> latents -> diffusion -> evaluate -> export
"""

import contextlib
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines import __version__
from pipelines.compute.cluster import connect
from pipelines.config import Config
from pipelines.errors import UserError, explain
from pipelines.run.plan import STAGES, PlannedStage, Selection, plan, plan_stage
from pipelines.run.recipe import Recipe
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
# What the pipeline's own MLflow run shows of its stages, so that runs can be compared in one table.
HEADLINES = {
    "pairs": ("samples",),
    "autoencoder": ("final_loss", "psnr_db"),
    "latents": ("scale_factor",),
    "diffusion": ("final_loss", "images_per_s"),
    "evaluate": ("alignment_accuracy",),
}


def run(
    recipe: Recipe,
    selection: Selection | None = None,
    observer: RunObserver | None = None,
    *,
    debug: bool = False,
) -> RunResult:
    """Walk the stages; every one is `cached`, `resumed`, `run` or `skipped` afterwards.

    Raises:
        UserError: what a person can mend, on one line; what is committed stays.
    """
    walk = _Walk(recipe, selection or Selection(), observer or RunObserver(), debug)
    return walk.run()


@dataclass
class _Walk:
    recipe: Recipe
    selection: Selection
    observer: RunObserver
    debug: bool
    rows: list[StageRow] = field(default_factory=list)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def run(self) -> RunResult:
        started = time.monotonic()
        root = Storage(self.recipe.root)
        tracking = self.recipe.tracking
        result = RunResult(root.url, self.rows, self.artifacts, store(tracking, root)[0] if tracking.enabled else None)
        # What is wrong with any stage's inputs is said before the first one runs.
        plan(self.recipe, self.selection)
        with contextlib.ExitStack() as stack:
            self.hold: Hold = stack.enter_context(exclusive(root))
            self.tracker: Tracker | None = None
            try:
                self._walk(Ledger(root), root, stack)
            except BaseException:
                self._finish_tracking("FAILED", result, root)
                raise
            if self.tracker is None and self._unfinished(root):
                # Killed between the last stage and the report: both are still due.
                self.tracker = self._start_tracking(root)
            result.report = self._report(root)
            self._finish_tracking("FINISHED", result, root)
        result.wall_s = round(time.monotonic() - started, 3)
        return result

    def _walk(self, ledger: Ledger, root: Storage, stack: contextlib.ExitStack) -> None:
        for stage in STAGES:
            self.hold.check()
            planned = plan_stage(self.recipe, ledger, stage, self.keys, self.selection)
            self.keys[stage.name] = planned.reference
            if planned.state in ("cached", "skipped"):
                self._record(planned, planned.artifact, 0.0)
                continue
            self._check_upstream(stage)
            if self.tracker is None:
                self.tracker = self._start_tracking(root)
                stack.enter_context(connect(self.recipe.cluster, debug=self.debug))
            self._run_stage(ledger, planned, self.tracker)

    def _check_upstream(self, stage: Stage) -> None:
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
        storage.remove_leftovers()
        started = time.monotonic()
        writer = ArtifactWriter(stage.name, planned.key, storage)
        stage_tracker = self._track_stage(tracker, planned, storage)
        try:
            with tempfile.TemporaryDirectory(prefix=f"ldm-{stage.name}-") as scratch:
                details = stage.run(
                    StageContext(
                        config=planned.config,
                        seed=self.recipe.seed,
                        writer=writer,
                        upstream={name: self.artifacts[name] for name in stage.upstream},
                        tracker=stage_tracker,
                        progress=self._progress(stage.name),
                        scratch=Path(scratch),
                        finished=planned.artifact,
                        check=self.hold.check,
                    )
                )
        except BaseException as error:
            stage_tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
            if isinstance(error, Exception) and not isinstance(error, UserError) and (known := explain(error)):
                raise known from error
            raise
        seconds = time.monotonic() - started
        self.hold.check()
        writer.finish(
            format_version=stage.format_version,
            config=planned.config.model_dump(mode="json"),
            identity=planned.identity,
            upstream={name: self.keys[name] for name in stage.upstream},
            details=details,
            seconds=seconds,
            code_version=__version__,
        )
        stage_tracker.finish("FINISHED")
        artifact = ledger.find(stage.name, planned.key)
        assert artifact is not None
        if planned.state != "retried":
            artifact = self._settle(ledger, planned, artifact)
        self.keys[stage.name] = artifact.reference
        self._record(planned, artifact, seconds)

    def _settle(self, ledger: Ledger, planned: PlannedStage, artifact: Artifact) -> Artifact:
        if stage_generation := planned.identity.get("generation", 0):
            before = {**planned.identity, "generation": stage_generation - 1}
            if stage_generation == 1:
                before.pop("generation")
            if old := ledger.find(planned.stage.name, artifact_key(before)):
                return ledger.supersede(old, artifact)
        return artifact

    def _record(self, planned: PlannedStage, artifact: Artifact | None, seconds: float) -> None:
        row = StageRow(planned.stage.name, planned.state, planned.key, seconds=round(seconds, 3))
        if artifact:
            self.artifacts[planned.stage.name] = artifact
            row.key, row.rows, row.bytes = artifact.key, artifact.manifest.rows, artifact.manifest.bytes
        self.rows.append(row)
        self.observer.end(row)

    def _progress(self, name: str) -> Progress:
        def progress(done: int, total: int, **facts: str) -> None:
            self.observer.progress(name, done, total, **facts)

        return progress

    def _start_tracking(self, root: Storage) -> Tracker:
        """One MLflow run a pipeline run; what was killed or failed goes on in the run that it began."""
        spool = Path(root.path() if root.is_local else ".") / ".tracking"
        tracker = Tracker(self.recipe.tracking, root, spool)
        values = self.recipe.model_dump(mode="json")
        tracker.start_pipeline(self.recipe.name, values, {"ldm.root": root.url}, resume_run_id=self._unfinished(root))
        if tracker.run_id:
            root.write_json(UNFINISHED, {"run_id": tracker.run_id, "recipe": self._digest})
        return tracker

    @property
    def _digest(self) -> str:
        return digest_json({name: section.identity() for name, section in self.recipe if isinstance(section, Config)})

    def _unfinished(self, root: Storage) -> str | None:
        """The MLflow run of a pipeline run of this recipe that was killed or failed."""
        begun = root.read_json(UNFINISHED) if root.exists(UNFINISHED) else {}
        return begun.get("run_id") if begun.get("recipe") == self._digest else None

    @staticmethod
    def _track_stage(tracker: Tracker, planned: PlannedStage, storage: Storage) -> StageTracker:
        begun = storage.read_json(TRACKING) if storage.exists(TRACKING) else {}
        stage_tracker = tracker.stage(planned.stage.name, planned.key, resume_run_id=begun.get("run_id"))
        if not begun:
            stage_tracker.params(planned.identity["config"])
            storage.write_json(TRACKING, {"run_id": stage_tracker.run_id})
        return stage_tracker

    def _finish_tracking(self, status: Literal["FINISHED", "FAILED"], result: RunResult, root: Storage) -> None:
        if self.tracker:
            if status == "FINISHED":
                root.remove(UNFINISHED)
                self.tracker.pipeline.metrics(_headlines(self.artifacts))
            self.tracker.finish(status)
            self.tracker.close()
            result.run_id = self.tracker.run_id

    def _report(self, root: Storage) -> str | None:
        if not self.artifacts:
            return None
        if self.tracker or not root.exists(REPORT):
            from pipelines.run.report import build_report

            html = build_report(root, self.recipe.to_yaml(), self.rows, self.artifacts)
            root.write_bytes(REPORT, html.encode())
        if self.tracker:
            with root.local_copy(REPORT) as path:
                self.tracker.pipeline.artifact(path)
        return f"{root.url}/{REPORT}"


def _headlines(artifacts: dict[str, Artifact]) -> dict[str, float]:
    return {
        f"{name}/{key}": float(artifacts[name].details[key])
        for name, keys in HEADLINES.items()
        for key in keys
        if name in artifacts and artifacts[name].details.get(key) is not None
    }
