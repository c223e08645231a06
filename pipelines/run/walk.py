"""Run the stages in order: skip the cached ones, resume what was begun, run the rest.

pairs -> autoencoder -> latents -> diffusion -> evaluate -> export
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipelines import __version__
from pipelines.compute.cluster import connect
from pipelines.compute.tasks import for_each
from pipelines.errors import UserError, explain
from pipelines.notices import told_to
from pipelines.run.plan import STAGES, PlannedStage, Selection, plan, plan_stage
from pipelines.run.recipe import Recipe
from pipelines.run.report import build_report
from pipelines.run.results import RunObserver, RunResult, StageRow
from pipelines.run.runs import REPORT, Run, all_runs, begin
from pipelines.secrets import without_secrets
from pipelines.stage import Progress, Stage, StageContext
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileTable
from pipelines.store.known_digests import kept_with
from pipelines.store.ledger import TRACKING, Artifact, Ledger, artifact_key, digest_json
from pipelines.store.lock import Hold, Record, exclusive
from pipelines.store.storage import Storage
from pipelines.tracking import StageTracker, Tracker, spool_folder, store

# The contents of the upstream artifacts that an unfinished stage was begun from.
MADE_FROM = "made_from.json"


def run(
    recipe: Recipe,
    selection: Selection | None = None,
    observer: RunObserver | None = None,
    *,
    debug: bool = False,
    wait: bool = True,
) -> RunResult:
    """Walk the stages; every one is `cached`, `resumed`, `retried`, `run` or `skipped` afterwards.

    Several runs may share a root. An artifact is made by one of them at a time; who only reads it needs no lock.

    Args:
        recipe: what to run.
        selection: which stages; all of the recipe's by default.
        observer: told what happens.
        debug: show Ray's own log.
        wait: wait for an artifact that another run is making; otherwise refuse.

    Raises:
        UserError: what a person can mend, on one line; what is committed stays.
    """
    started = time.monotonic()
    root = Storage(recipe.root)
    # Said before the first stage runs: whatever is wrong with any stage's section or inputs.
    planned = plan(recipe, selection)
    observer = observer or RunObserver()
    with told_to(observer.notice):
        walk = _Walk(recipe, selection or Selection(), observer, debug, wait, root)
        result = walk.run(planned)
    result.wall_s = round(time.monotonic() - started, 3)
    return result


@dataclass
class _Walk:
    """One run."""

    recipe: Recipe
    selection: Selection
    observer: RunObserver
    debug: bool
    wait: bool
    root: Storage
    tracker: Tracker | None = None
    rows: list[StageRow] = field(default_factory=list)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def run(self, planned: list[PlannedStage]) -> RunResult:
        tracking = self.recipe.tracking
        uri = without_secrets(store(tracking, self.root)[0]) if tracking.enabled else None
        result = RunResult(self.root.url, self.rows, self.artifacts, uri)
        if (before := self._run_before(planned)) is not None:
            for each in planned:
                self._record(each, each.artifact, 0.0)
            result.report = f"{before.folder.url}/{REPORT}" if self.artifacts else None
            return result
        ledger = Ledger(self.root)
        with begin(self.root, self.recipe.name, self.recipe.to_yaml(), self._digest(planned)) as this_run:
            ledger.mark_version()
            with contextlib.ExitStack() as stack:
                try:
                    for each in planned:
                        self._settle_stage(ledger, each.stage, this_run, stack)
                except BaseException:
                    self._finish_tracking("FAILED", result)
                    raise
                if self.tracker is None and this_run.state.tracking_run:
                    # Killed between the last stage and the report: both are still due.
                    self.tracker = self._start_tracking(this_run)
                result.report = self._report(this_run)
                self._finish_tracking("FINISHED", result)
        return result

    def _run_before(self, planned: list[PlannedStage]) -> Run | None:
        """Return the finished run of this recipe that stands on the same artifacts, if there is nothing to do."""
        if any(each.state not in ("cached", "skipped") for each in planned):
            return None
        digest = self._digest(planned)
        standing = {each.stage.name: each.reference if each.artifact else None for each in planned}
        for earlier in all_runs(self.root):
            if earlier.state.recipe_digest == digest and earlier.state.state == "finished":
                return earlier if {s.name: s.reference for s in earlier.state.stages} == standing else None
        return None

    def _digest(self, planned: list[PlannedStage]) -> str:
        """Digest the recipe and the contents of what it reads, whose places are no settings."""
        return digest_json([self.recipe.settings(), [each.identity.get("inputs", {}) for each in planned]])

    def _settle_stage(self, ledger: Ledger, stage: Stage[Any], this_run: Run, stack: contextlib.ExitStack) -> None:
        """Find a stage cached, or make its artifact while nobody else does."""
        while True:
            # Planned again: a stage that ran since may have settled on another key, and hours later a vocabulary or a
            # file of prompts may be another one. What has not changed is remembered, not digested again.
            planned = plan_stage(self.recipe, ledger, stage, self.keys, self.selection)
            if planned.state in ("cached", "skipped"):
                self.keys[stage.name] = planned.reference
                self._record(planned, planned.artifact, 0.0)
                break
            with self._held(planned) as hold:
                # Whoever held it may have finished it meanwhile, or replaced it by another generation.
                now = plan_stage(self.recipe, ledger, stage, self.keys, self.selection)
                if (now.key, now.state in ("cached", "skipped")) != (planned.key, False):
                    continue
                self.keys[stage.name] = now.reference
                self._check_upstream(stage)
                if self.tracker is None:
                    self.tracker = self._start_tracking(this_run)
                    stack.enter_context(connect(self.recipe.cluster, debug=self.debug))
                # Before it begins, so that `ldm gc` knows what a run that is killed can go on with.
                this_run.record(StageRow(stage.name, now.state, now.key), None)
                self._run_stage(ledger, now, self.tracker, hold)
                break
        this_run.record(self.rows[-1], self.artifacts.get(stage.name))

    @contextlib.contextmanager
    def _held(self, planned: PlannedStage) -> Iterator[Hold]:
        """Hold the artifact to be made, after whoever makes it now."""
        name = planned.stage.name

        def show(holder: Record) -> None:
            self.observer.waiting(planned, holder["holder"], **holder["progress"])

        place = Ledger(self.root).lock(name, planned.key)
        what = f"{name} {planned.key} under {self.root.url}"
        with exclusive(place, what=what, wait=show if self.wait else None, interrupt=True) as hold:
            try:
                yield hold
            except KeyboardInterrupt:
                # By the lease, if it is lost: then that is the reason to give.
                hold.check()
                raise

    def _check_upstream(self, stage: Stage[Any]) -> None:
        for name in stage.upstream:
            if name not in self.artifacts:
                raise UserError(
                    f"{stage.name} needs {name}, which is not finished (key {self.keys[name]}): "
                    "run it first, by the same command without --only and --from"
                )
            self.artifacts[name].check_sizes()

    def _run_stage(self, ledger: Ledger, planned: PlannedStage, tracker: Tracker, hold: Hold) -> None:
        stage, storage = planned.stage, ledger.storage(planned.stage.name, planned.key)
        self.observer.begin(planned)
        # Whoever wrote them is dead: the artifact is ours, and this stage has no worker yet.
        storage.remove_leftovers()
        started = time.monotonic()
        writer = ArtifactWriter(stage.name, planned.key, storage, grows=planned.artifact is not None)
        count = _Count(stage.name, self.observer, hold)
        stage_tracker = self._track_stage(tracker, planned, storage)
        made = ledger.find(stage.name, planned.key) if planned.artifact is None else None
        if made is not None:
            # By a forced re-run that was killed before it was held against the artifact before it.
            artifact = self._settle(ledger, planned, made, hold)
            seconds = time.monotonic() - started
        else:
            self._require_same_upstream(planned, storage)
            details = self._call(planned, writer, count, stage_tracker, hold)
            seconds = time.monotonic() - started
            # A driver that slept too long was taken for dead: another one makes this artifact now, and it is not ours
            # to finish.
            hold.check()
            self._require_same_inputs(planned)
            artifact = self._finish(ledger, planned, writer, details, seconds, hold)
        stage_tracker.finish("FINISHED")
        self.keys[stage.name] = artifact.reference
        self._record(planned, artifact, seconds, count.worked)

    def _call(
        self, planned: PlannedStage, writer: ArtifactWriter, progress: Progress, tracker: StageTracker, hold: Hold
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
                        check=hold.check,
                        siblings=partial(self._siblings, planned),
                    )
                )
        except BaseException as error:
            tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
            if isinstance(error, Exception) and not isinstance(error, UserError) and (known := explain(error)):
                raise known from error
            raise
        return details

    def _contents_read(self, planned: PlannedStage) -> dict[str, str]:
        """Return the contents of the upstream artifacts that the stage depends on."""
        return {name: self.artifacts[name].manifest.content for name in planned.identity.get("upstream", {})}

    def _require_same_upstream(self, planned: PlannedStage, storage: Storage) -> None:
        """Refuse to go on with what was begun from other files: a key stands for what servers answered only once."""
        contents = self._contents_read(planned)
        begun = storage.read_json(MADE_FROM) if storage.exists(MADE_FROM) else contents
        if begun != contents:
            raise UserError(
                f"{storage.url} was begun from other files of {', '.join(contents)} than there are now, which were "
                "made anew under the same key: remove that folder and run the same command again"
            )
        storage.write_json(MADE_FROM, contents)

    def _require_same_contents(self, planned: PlannedStage, artifact: Artifact) -> None:
        """Refuse a finished artifact that was made from other files than the upstream artifacts hold now."""
        for name, content in artifact.manifest.made_from.items():
            if name in self.artifacts and self.artifacts[name].manifest.content != content:
                raise UserError(
                    f"{artifact.storage.url} was made from other files of {name} {self.artifacts[name].key} than "
                    "there are now, which were made anew under the same key: run "
                    f"`ldm run RECIPE --force {planned.stage.name}`"
                )

    def _require_same_inputs(self, planned: PlannedStage) -> None:
        """Refuse to finish what was made from a source, weights or prompts that changed meanwhile."""
        before = planned.identity.get("inputs", {})
        with kept_with(self.root):
            now = planned.stage.inputs(planned.config)
        if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
            raise UserError(
                f"{planned.stage.name}: {', '.join(changed)} changed while the stage ran, so that what it made is of "
                f"neither: put back what was there and run the same command again, or remove {planned.key} of "
                f"{planned.stage.name} under {self.root.url} and begin anew"
            )

    def _siblings(self, planned: PlannedStage) -> Iterator[tuple[Storage, FileTable]]:
        # Whoever forces a stage does not trust what is there.
        if planned.stage.name not in self.selection.force:
            yield from Ledger(self.root).siblings(planned.stage.name, planned.key)

    def _finish(
        self,
        ledger: Ledger,
        planned: PlannedStage,
        writer: ArtifactWriter,
        details: dict[str, Any],
        seconds: float,
        hold: Hold,
    ) -> Artifact:
        """Write the manifest; return the artifact that stands for the stage from now on."""
        stage = planned.stage
        writer.finish(
            format_version=stage.format_version,
            config=planned.config.model_dump(mode="json"),
            identity=planned.identity,
            # What the key depends on: an imported first stage is not made from the pairs that it is shown on.
            upstream=planned.identity.get("upstream", {}),
            details=details,
            seconds=seconds,
            code_version=__version__,
            logs=stage.logs,
            made_from=self._contents_read(planned),
        )
        artifact = ledger.find(stage.name, planned.key)
        assert artifact is not None
        return artifact if planned.state == "retried" else self._settle(ledger, planned, artifact, hold)

    def _settle(self, ledger: Ledger, planned: PlannedStage, artifact: Artifact, hold: Hold) -> Artifact:
        """Compare a forced re-run with the generation before it; return the artifact that stays current."""
        if generation := planned.identity.get("generation", 0):
            before = {**planned.identity, "generation": generation - 1}
            if generation == 1:
                # The first one was made without --force, and its key without a generation.
                before.pop("generation")
            if old := ledger.find(planned.stage.name, artifact_key(before)):
                in_tasks = partial(for_each, check=hold.check)
                return ledger.supersede(old, artifact, logs=planned.stage.logs, for_each=in_tasks)
        return artifact

    def _record(self, planned: PlannedStage, artifact: Artifact | None, seconds: float, worked: int = 0) -> None:
        stage = planned.stage
        row = StageRow(
            stage.name, planned.state, planned.key, seconds=round(seconds, 3), worked=worked, unit=stage.unit
        )
        if artifact:
            self._require_same_contents(planned, artifact)
            self.artifacts[stage.name] = artifact
            row.key, row.rows, row.bytes = artifact.key, artifact.manifest.rows, artifact.manifest.bytes
        self.rows.append(row)
        self.observer.end(row)

    def _start_tracking(self, this_run: Run) -> Tracker:
        """Begin the MLflow run of this pipeline run, or go on in the one that a killed or failed run began."""
        tracker = Tracker(self.recipe.tracking, self.root, spool_folder(self.root))
        values, tags = self.recipe.resolved(), {"ldm.root": self.root.url, "ldm.run_folder": this_run.folder.url}
        tracker.start_pipeline(self.recipe.name, values, tags, resume_run_id=this_run.state.tracking_run)
        this_run.track(tracker.run_id)
        return tracker

    @staticmethod
    def _track_stage(tracker: Tracker, planned: PlannedStage, storage: Storage) -> StageTracker:
        begun = storage.read_json(TRACKING) if storage.exists(TRACKING) else {}
        stage_tracker = tracker.stage(planned.stage.name, planned.key, resume_run_id=begun.get("run_id"))
        if not begun:
            stage_tracker.params(planned.config.settings())
            storage.write_json(TRACKING, {"run_id": stage_tracker.run_id})
        return stage_tracker

    def _finish_tracking(self, status: Literal["FINISHED", "FAILED"], result: RunResult) -> None:
        if self.tracker:
            if status == "FINISHED":
                self.tracker.pipeline.metrics(_headlines(self.artifacts))
            self.tracker.finish(status)
            self.tracker.close()
            result.run_id = self.tracker.run_id

    def _report(self, this_run: Run) -> str | None:
        if not self.artifacts:
            return None
        html = build_report(self.root, self.recipe.to_yaml(), self.rows, self.artifacts).encode()
        this_run.folder.write_bytes(REPORT, html)
        # The newest run's, where people look first.
        self.root.write_bytes(REPORT, html)
        if self.tracker:
            with this_run.folder.local_copy(REPORT) as path:
                self.tracker.pipeline.artifact(path)
        return f"{this_run.folder.url}/{REPORT}"


class _Count:
    """Pass a stage's progress on to the observer and to runs that wait, and count what this run has worked on."""

    def __init__(self, name: str, observer: RunObserver, hold: Hold) -> None:
        self._name, self._observer, self._hold = name, observer, hold
        self._first: int | None = None
        self._last = 0

    def __call__(self, done: int, total: int, **facts: str) -> None:
        # What an earlier run has done is in the first report.
        self._first = done if self._first is None else min(self._first, done)
        self._last = done
        self._observer.progress(self._name, done, total, **facts)
        self._hold.tell(done=done, total=total, facts=facts)

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
