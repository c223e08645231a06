"""The thread that carries events from the spool to MLflow. Only here is MLflow imported: it takes seconds."""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.tracking.spool import Event, Session

log = logging.getLogger(__name__)

GATHER_S = 0.3  # events that come close together travel together
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
BATCH_KINDS = ("metrics", "params", "tags")
LARGEST_BATCH = {"metrics": 800, "params": 100, "tags": 100}  # limits of MLflow's log-batch request
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")

# MLflow's own patience would hide an outage for minutes; ours lies in the spool. And no telemetry.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


class _GaveUpError(Exception):
    """The time that `close` granted is over."""


class Sender(threading.Thread):
    """Sends abandoned sessions first, then its own as it grows. A daemon: it never holds the process up.

    Args:
        session: this process's events.
        spool: where abandoned sessions lie.
        uri: tracking URI.
        experiment: made where it is missing, with its artifacts at `artifacts` (None: the server's default).
    """

    def __init__(self, session: Session, spool: Path, *, uri: str, experiment: str, artifacts: str | None) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self.session, self.spool = session, spool
        self.uri, self.experiment, self.artifacts = uri, experiment, artifacts
        self.experiment_id: str | None = None
        self.last_error: str | None = None
        self._client: Any = None
        self._runs: dict[str, str] = {}
        self._known = threading.Condition()
        self._deadline: float | None = None
        self._finished = False

    def run(self) -> None:
        try:
            for session in Session.abandoned(self.spool):
                self._drain(session)
                self._mark_killed(session)
                session.release(remove=True)
            while self._deadline is None:
                self.session.changed.wait()
                self._pause(GATHER_S)
                self.session.changed.clear()
                self._drain(self.session)
            self._drain(self.session)
            self._finished = True
        except _GaveUpError:
            pass
        except Exception:
            log.exception("the MLflow sender stopped; what is not sent yet stays in %s", self.spool)
        self.session.release(remove=self._finished)

    def close(self, timeout_s: float) -> bool:
        """Wait until everything is sent, at most `timeout_s`; returns whether it is."""
        self._deadline = time.monotonic() + timeout_s
        self.session.changed.set()
        self.join(timeout_s)
        return self._finished

    def mlflow_run_id(self, run_id: str, timeout_s: float) -> str | None:
        """MLflow's id of one of our runs, once it is known there."""
        with self._known:
            self._known.wait_for(lambda: run_id in self._runs, timeout_s)
            return self._runs.get(run_id)

    def _drain(self, session: Session) -> None:
        while pending := session.pending():
            for group in _groups(pending):
                events = [event for event, _ in group]
                self._deliver(session, events)
                session.acknowledge(group[-1][1])
                for event in events:
                    if "file" in event:
                        session.remove_file(event["file"])

    def _deliver(self, session: Session, events: list[Event]) -> None:
        try:
            self._persist(lambda: self._send(session, events))
        except _GaveUpError:
            raise
        except Exception as error:
            if len(events) > 1:  # find the one that is refused, and send the others
                for event in events:
                    self._deliver(session, [event])
            else:
                log.warning("MLflow refused %s: %s", _brief(events[0]), _first_line(error))

    def _persist(self, send: Callable[[], None]) -> None:
        """Try until it succeeds or is refused for good; give up only when the time of `close` is over."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                return send()
            except Exception as error:
                if _is_refusal(error):
                    raise
                if self.last_error is None:
                    log.warning("MLflow at %s does not answer; will keep trying: %s", self.uri, _first_line(error))
                self.last_error = _first_line(error)
            self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            if self._deadline is not None:
                if now > self._deadline:
                    raise _GaveUpError
                until = min(until, now + FIRST_PAUSE_S)
            time.sleep(min(0.1, until - now))

    def _send(self, session: Session, events: list[Event]) -> None:
        client = self._connect()
        kind, run_id = events[0]["kind"], self._mlflow_run(events[0]["run"], events[0])
        if kind in BATCH_KINDS:
            client.log_batch(run_id, **_batch(events))
        elif kind == "image":
            image = _load_image(session.folder / events[0]["file"])
            client.log_image(run_id, image, key=events[0]["key"], step=events[0]["step"])
        elif kind == "file":
            path = session.folder / events[0]["file"]
            if not path.exists():
                raise ValueError(f"{path.name} is gone from the spool")
            client.log_artifact(run_id, str(path), events[0]["folder"] or None)
        elif kind == "finish":
            client.set_terminated(run_id, events[0]["status"], end_time=events[0]["time_ms"])
        self.last_error = None

    def _connect(self) -> Any:
        if self._client is None:
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            logging.getLogger("alembic").setLevel(logging.WARNING)
            from mlflow import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.WARNING)
            client = MlflowClient(tracking_uri=self.uri)
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                self.experiment_id = client.create_experiment(self.experiment, self.artifacts)
            else:
                self.experiment_id = experiment.experiment_id
                if experiment.lifecycle_stage == "deleted":
                    client.restore_experiment(self.experiment_id)
            self._client = client
        return self._client

    def _mlflow_run(self, run: str, event: Event) -> str:
        """MLflow's run for ours: known, found by its tag, or made. A `start` also reopens a finished run."""
        if run not in self._runs or event["kind"] == "start":
            found = self._find(run)
            mlflow_id = found or self._create(run, event)
            if found and event["kind"] == "start":
                self._client.update_run(mlflow_id, status="RUNNING")
                for name, value in self._tags(event).items():
                    self._client.set_tag(mlflow_id, name, value)
            with self._known:
                self._runs[run] = mlflow_id
                self._known.notify_all()
        return self._runs[run]

    def _find(self, run: str) -> str | None:
        found = self._client.search_runs([self.experiment_id], f"tags.`ldm.run` = '{run}'", max_results=1)
        return found[0].info.run_id if found else None

    def _create(self, run: str, event: Event) -> str:
        created = self._client.create_run(
            self.experiment_id,
            start_time=event["time_ms"],
            run_name=event.get("name", "continued"),
            tags={"ldm.run": run, **self._tags(event)},
        )
        return str(created.info.run_id)

    def _tags(self, event: Event) -> dict[str, str]:
        tags = dict(event.get("tags", {}))
        if (parent := event.get("parent")) and (known := self._runs.get(parent) or self._find(parent)):
            tags["mlflow.parentRunId"] = known
        return tags

    def _mark_killed(self, session: Session) -> None:
        """Runs that an abandoned session never finished died with it; a later `start` opens them again."""
        open_runs: dict[str, Event] = {}
        for event in session.everything():
            if event["kind"] == "finish":
                open_runs.pop(event["run"], None)
            else:
                open_runs[event["run"]] = event
        for last in open_runs.values():
            self._deliver(session, [{**last, "kind": "finish", "status": "KILLED"}])


def _groups(pending: list[tuple[Event, int]]) -> list[list[tuple[Event, int]]]:
    """Neighbours of one run that fit into one log-batch request; everything else alone, in order."""
    groups: list[list[tuple[Event, int]]] = []
    sizes = dict.fromkeys(BATCH_KINDS, 0)
    for event, position in pending:
        kind = event["kind"]
        previous = groups[-1][-1][0] if groups else None
        joins = (
            previous is not None
            and kind in BATCH_KINDS
            and previous["kind"] in BATCH_KINDS
            and previous["run"] == event["run"]
            and sizes[kind] + len(event["values"]) <= LARGEST_BATCH[kind]
        )
        if not joins:
            groups.append([])
            sizes = dict.fromkeys(BATCH_KINDS, 0)
        if kind in BATCH_KINDS:
            sizes[kind] += len(event["values"])
        groups[-1].append((event, position))
    return groups


def _batch(events: list[Event]) -> dict[str, list[Any]]:
    from mlflow.entities import Metric, Param, RunTag

    batch: dict[str, list[Any]] = {"metrics": [], "params": [], "tags": []}
    for event in events:
        for name, value in event["values"].items():
            if event["kind"] == "metrics":
                # The event's time, not the sending's: a metric sent twice is then one row for MLflow.
                batch["metrics"].append(Metric(name, value, event["time_ms"], event["step"]))
            elif event["kind"] == "params":
                batch["params"].append(Param(name, value))
            else:
                batch["tags"].append(RunTag(name, value))
    return batch


def _load_image(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, EOFError) as error:
        raise ValueError(f"the spooled image is damaged: {error}") from error


def _is_refusal(error: Exception) -> bool:
    """Whether trying again is pointless: MLflow rejects the request, or the event itself cannot be sent."""
    code = getattr(error, "error_code", None)
    return code in REFUSALS if code is not None else isinstance(error, ValueError | TypeError | KeyError)


def _brief(event: Event) -> str:
    what = ", ".join(event["values"]) if "values" in event else event.get("key") or event.get("file") or event["run"]
    return f"{event['kind']} {what}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
