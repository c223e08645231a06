"""What the pipeline logs: one MLflow run for itself, and one nested run per stage. Nothing here waits."""

import errno
import hashlib
import logging
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelines.errors import UserError
from pipelines.secrets import without_secrets
from pipelines.store.storage import Storage
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.places import store
from pipelines.tracking.sender import LARGEST_BATCH, Sender
from pipelines.tracking.spool import Event, Session

log = logging.getLogger(__name__)

LONGEST_PARAM = 500
# Rates are taken whenever an item is done, of which a run may have a million.
RATE_EVERY_S = 5.0


class StageTracker:
    """The run of one stage. Built by `Tracker.stage`; `null_stage_tracker()` gives one that logs nothing.

    Attributes:
        run_id: our own id of the run, known at once (MLflow's run carries it as the tag `ldm.run`). Passed as
            `resume_run_id` after a restart, it continues the same MLflow run. None if nothing is logged.
    """

    def __init__(self, tracker: "Tracker | None", run_id: str | None) -> None:
        self._tracker = tracker
        self.run_id = run_id
        self._rate_logged: dict[str, float] = {}

    def rate(self, name: str, value: float, step: int) -> None:
        """Log a rate, or something else of which a point every few seconds is enough; drop it in between."""
        now = time.monotonic()
        if now - self._rate_logged.get(name, -RATE_EVERY_S) >= RATE_EVERY_S:
            self._rate_logged[name] = now
            self.metric(name, value, step)

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        self.metrics({name: value}, step)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log values at a step. A step that this metric has passed is not sent again: a restart has done it twice."""
        self._put("metrics", values={name: float(value) for name, value in values.items()}, step=step or 0)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; a nested mapping becomes dotted names."""
        flat = list(_flatten(values).items())
        for start in range(0, len(flat), LARGEST_BATCH["params"]):
            self._put("params", values=dict(flat[start : start + LARGEST_BATCH["params"]]))

    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log a picture, (H, W, 3) uint8; the pictures of one `key` become a series over steps in MLflow.

        Raises:
            ValueError: the array has another dtype or shape.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"image {key!r} must be uint8 (H, W, 3), got {image.dtype} {image.shape}: convert it first"
            )
        # Spooled raw, not as PNG: encoding a large grid takes longer than training should wait.
        self._put_file("image", "image.npy", lambda path: np.save(path, image), key=key, step=step)

    def artifact(self, local_path: Path, folder: str = "") -> None:
        """Log a small file. It is copied now, so that it may be changed or removed afterwards."""
        path = Path(local_path)
        self._put_file("file", path.name, lambda target: shutil.copyfile(path, target), folder=folder)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._put("finish", status=status)

    def _put(self, kind: str, **fields: Any) -> None:
        if self._tracker is not None:
            self._tracker.put({"kind": kind, "run": self.run_id, **fields})

    def _put_file(self, kind: str, name: str, write: Any, **fields: Any) -> None:
        if self._tracker is not None:
            self._tracker.put_file({"kind": kind, "run": self.run_id, **fields}, name, write)


def null_stage_tracker() -> StageTracker:
    """Return a tracker that logs nothing, for tests and library use."""
    return StageTracker(None, None)


class Tracker:
    """A pipeline's connection to MLflow.

    Events are appended to a spool on disk, and a thread of this process sends them from there. MLflow may be slow or
    down: nothing waits for it and nothing is lost. What could not be sent before the process ended is sent by the next
    Tracker on the same spool.

    Args:
        config: where to log; with `enabled=False` every call does nothing.
        root: the folder of the pipeline's artifacts; without a tracking URI, the SQLite store is in its `home`.
        spool: a local folder for events that are not sent yet; shared by all runs on this root.
    """

    def __init__(self, config: TrackingConfig, root: Storage, spool: Path) -> None:
        self.run_id: str | None = None
        self._session: Session | None = None
        self._sender: Sender | None = None
        self._pipeline = null_stage_tracker()
        self._warned = False
        if not config.enabled:
            return
        uri, artifacts = store(config, root)
        # One queue per destination: what was meant for one server is never sent to another. Without the password, which
        # could be guessed from the name.
        destination = f"{without_secrets(uri)} {config.experiment}"
        target = Path(spool) / hashlib.sha256(destination.encode()).hexdigest()[:12]
        try:
            self._session = Session.create(target)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise UserError(
                f"{target}, where events wait for MLflow, cannot be written ({error.strerror}): set LDM_HOME to "
                "another folder, or tracking.enabled=false"
            ) from error
        self._sender = Sender(self._session, target, uri=uri, experiment=config.experiment, artifacts=artifacts)
        self._sender.start()

    def start_pipeline(
        self, name: str, recipe: Mapping[str, Any], tags: Mapping[str, str], resume_run_id: str | None = None
    ) -> None:
        """Start the parent run, or continue an earlier one; its parameters are the resolved recipe."""
        self._pipeline = self._start(name, tags, resume_run_id)
        self.run_id = self._pipeline.run_id
        if resume_run_id is None:
            self._pipeline.params(recipe)
            text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
            self._pipeline._put_file("file", "recipe.yaml", lambda p: p.write_text(text, "utf-8"), folder="")

    def stage(self, name: str, key: str, resume_run_id: str | None = None) -> StageTracker:
        """Start a stage's run under the parent, or continue an earlier one, now under this parent."""
        return self._start(name, {"ldm.stage": name, "ldm.key": key}, resume_run_id, parent=self.run_id)

    @property
    def pipeline(self) -> StageTracker:
        """The parent run, for what belongs to no stage: the report and the headline metrics."""
        return self._pipeline

    def finish(self, status: str = "FINISHED") -> None:
        """End the parent run as FINISHED, FAILED or KILLED."""
        self._pipeline.finish(status)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Send what is left, for at most `timeout_s`; the rest stays in the spool for the next run.

        Returns:
            True if everything has arrived.
        """
        if self._sender is None or self._session is None:
            return True
        sender, self._session = self._sender, None
        if sender.close(timeout_s):
            return True
        log.warning(
            "MLflow at %s did not take everything within %.0f s (%s); the rest waits in %s for the next run",
            without_secrets(sender.uri),
            timeout_s,
            sender.last_error or "it is slow",
            sender.session.folder.parent,
        )
        return False

    def put(self, event: Event) -> None:
        """Queue an event. A full disk costs events, with one warning, never the run."""
        if self._session is None:
            return
        try:
            self._session.append({"time_ms": time.time_ns() // 1_000_000, **event})
        except (OSError, ValueError) as error:
            self._warn(error)

    def put_file(self, event: Event, name: str, write: Any) -> None:
        """Queue an event with a file, which `write(path)` writes; as `put`."""
        if self._session is None:
            return
        try:
            place = self._session.add_file(name, write)
        except OSError as error:
            self._warn(error)
        else:
            self.put({**event, "file": place})

    def _start(
        self, name: str, tags: Mapping[str, str], resume_run_id: str | None, parent: str | None = None
    ) -> StageTracker:
        if self._session is None:
            return null_stage_tracker()
        run_id = resume_run_id or uuid.uuid4().hex
        self.put({"kind": "start", "run": run_id, "name": name, "tags": dict(tags), "parent": parent})
        return StageTracker(self, run_id)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            log.warning("metrics are being lost: the tracking spool cannot be written (%s)", error)
        self._warned = True


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)[:LONGEST_PARAM]
    return flat
