"""The thread that sends events from the spool to MLflow. MLflow is imported only here and late: it takes seconds.

Delivery is at least once: events are acknowledged after they were sent, so that a kill in between sends them again.
That does no harm. A metric is not sent for a step that it has passed; a run is found by our own id, its tag `ldm.run`,
before a new one is created.
"""

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.secrets import without_secrets
from pipelines.tracking.database import make_database
from pipelines.tracking.spool import Event, Session

log = logging.getLogger(__name__)

# Events of one training step come close together: a short wait sends them in one request.
GATHER_S = 0.3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
# Limits of MLflow's log-batch request, by the kinds of events that can share one.
LARGEST_BATCH = {"metrics": 800, "params": 100}
# Error codes of requests that will be refused however often they are sent.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")

# With its own retries MLflow would hide an outage for minutes; the spool makes them needless. And no telemetry.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


class _GaveUpError(Exception):
    """The time that `close` allowed is over."""


class Sender(threading.Thread):
    """Sends abandoned sessions first, then its own as it grows. A daemon thread: it never keeps the process alive.

    Args:
        session: this process's events.
        spool: the folder in which abandoned sessions are found.
        uri: MLflow's tracking URI; a password in it is shown nowhere.
        experiment: name of the experiment; created if it is missing.
        artifacts: URI for the artifacts of a new experiment; None takes the server's default.
    """

    def __init__(self, session: Session, spool: Path, *, uri: str, experiment: str, artifacts: str | None) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self.session, self.spool = session, spool
        self.uri, self.experiment, self.artifacts = uri, experiment, artifacts
        self.experiment_id: str | None = None
        self.last_error: str | None = None
        self._client: Any = None
        # MLflow's run ids by ours, and the last step of each metric that such a run has.
        self._runs: dict[str, str] = {}
        self._last_steps: dict[str, dict[str, int]] = {}
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
            # What was appended between the last look and `close`.
            self._drain(self.session)
            self._finished = True
        except _GaveUpError:
            pass
        except OSError as error:
            log.warning("the MLflow sender stopped (%s); what is not sent yet stays in %s", error, self.spool)
        except Exception:
            reason = without_secrets(traceback.format_exc())
            log.error("the MLflow sender stopped; what is not sent yet stays in %s\n%s", self.spool, reason)
        self.session.release(remove=self._finished)

    def close(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` until everything is sent; return True if it is."""
        self._deadline = time.monotonic() + timeout_s
        self.session.changed.set()
        self.join(timeout_s)
        return self._finished

    def _drain(self, session: Session) -> None:
        """Send all that a session holds, in order."""
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
            # MLflow refuses a request as a whole: find the event that it was refused for, and send the others.
            if len(events) > 1:
                for event in events:
                    self._deliver(session, [event])
            else:
                log.warning("MLflow refused %s: %s", _brief(events[0]), _first_line(error))

    def _persist(self, send: Callable[[], None]) -> None:
        """Call `send` until it succeeds or MLflow refuses it for good; give up only when `close`'s time is over."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                return send()
            except Exception as error:
                if _is_refusal(error):
                    raise
                if self.last_error is None:
                    where = without_secrets(self.uri)
                    log.warning("MLflow at %s does not answer; will keep trying: %s", where, _first_line(error))
                self.last_error = _first_line(error)
            self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _pause(self, seconds: float) -> None:
        """Sleep, but not for long once `close` waits; raise _GaveUpError when its time is over."""
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
        if kind in LARGEST_BATCH:
            batch = _batch(events, self._last_steps[run_id])
            if any(batch.values()):
                client.log_batch(run_id, **batch)
            for metric in batch["metrics"]:
                self._last_steps[run_id][metric.key] = metric.step
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

            # What goes wrong is raised too, and said by us in one line; MLflow would add a traceback to each attempt.
            logging.getLogger("mlflow").setLevel(logging.CRITICAL)
            if self.artifacts is not None:
                make_database(self.uri, self.artifacts)
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
        """Return MLflow's run for ours: known, found by its tag, or created. A `start` also reopens a finished run."""
        if run not in self._runs or event["kind"] == "start":
            found = self._find(run)
            mlflow_id = found.info.run_id if found else self._create(run, event)
            known = found.data.to_proto().metrics if found else ()
            self._last_steps[mlflow_id] = {metric.key: metric.step for metric in known}
            if found and event["kind"] == "start":
                self._client.update_run(mlflow_id, status="RUNNING")
                for name, value in self._tags(event).items():
                    self._client.set_tag(mlflow_id, name, value)
            self._runs[run] = mlflow_id
        return self._runs[run]

    def _find(self, run: str) -> Any:
        """Return MLflow's run for ours, or None."""
        found = self._client.search_runs([self.experiment_id], f"tags.`ldm.run` = '{run}'", max_results=1)
        return found[0] if found else None

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
        if parent := event.get("parent"):
            if parent in self._runs:
                tags["mlflow.parentRunId"] = self._runs[parent]
            elif found := self._find(parent):
                tags["mlflow.parentRunId"] = found.info.run_id
        return tags

    def _mark_killed(self, session: Session) -> None:
        """Finish, as KILLED, the runs that an abandoned session left open; a later `start` opens them again."""
        open_runs: dict[str, Event] = {}
        for event in session.everything():
            if event["kind"] == "finish":
                open_runs.pop(event["run"], None)
            else:
                open_runs[event["run"]] = event
        for last in open_runs.values():
            self._deliver(session, [{**last, "kind": "finish", "status": "KILLED"}])


def _groups(pending: list[tuple[Event, int]]) -> list[list[tuple[Event, int]]]:
    """Group events in order: neighbours of one run that fit into one log-batch request, everything else alone."""
    groups: list[list[tuple[Event, int]]] = []
    sizes = dict.fromkeys(LARGEST_BATCH, 0)
    for event, position in pending:
        kind = event["kind"]
        previous = groups[-1][-1][0] if groups else None
        joins = (
            previous is not None
            and kind in LARGEST_BATCH
            and previous["kind"] in LARGEST_BATCH
            and previous["run"] == event["run"]
            and sizes[kind] + len(event["values"]) <= LARGEST_BATCH[kind]
        )
        if not joins:
            groups.append([])
            sizes = dict.fromkeys(LARGEST_BATCH, 0)
        if kind in LARGEST_BATCH:
            sizes[kind] += len(event["values"])
        groups[-1].append((event, position))
    return groups


def _batch(events: list[Event], last_steps: dict[str, int]) -> dict[str, list[Any]]:
    """Return the arguments of log-batch, without metrics at steps that the run has already."""
    from mlflow.entities import Metric, Param

    batch: dict[str, list[Any]] = {"metrics": [], "params": []}
    last = dict(last_steps)
    for event in events:
        for name, value in event["values"].items():
            if event["kind"] == "metrics":
                step = event["step"]
                # Training goes on from its newest checkpoint and does the steps after it again. A metric without steps
                # (0) may change.
                if step == 0 or step > last.get(name, 0):
                    last[name] = step
                    # The time of the event, not of sending: a metric that is sent twice is then one point in MLflow.
                    batch["metrics"].append(Metric(name, value, event["time_ms"], step))
            else:
                batch["params"].append(Param(name, value))
    return batch


def _load_image(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, EOFError) as error:
        raise ValueError(f"the spooled image is damaged: {error}") from error


def _is_refusal(error: Exception) -> bool:
    """Return True if trying again is pointless: MLflow rejects the request, or the event itself cannot be sent."""
    code = getattr(error, "error_code", None)
    return code in REFUSALS if code is not None else isinstance(error, ValueError | TypeError | KeyError)


def _brief(event: Event) -> str:
    what = ", ".join(event["values"]) if "values" in event else event.get("key") or event.get("file") or event["run"]
    return f"{event['kind']} {what}"


def _first_line(error: Exception) -> str:
    # SQLAlchemy begins with advice to programmers, then says what happened.
    lines = [line for line in str(error).splitlines() if not line.startswith("(raised as a result of")]
    return without_secrets((lines or [type(error).__name__])[0])[:300]
