"""Tracking against a real MLflow: an SQLite store, and a server that is killed and started again."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.store.storage import Storage
from pipelines.tracking import StageTracker, Tracker, null_stage_tracker
from pipelines.tracking.config import TrackingConfig


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store with MLflow's tables and nothing in them: making one takes seconds, copying it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def tracker_at(root: Path, uri: str | None = None) -> Tracker:
    return Tracker(TrackingConfig(uri=uri), Storage(str(root)), root / "spool")


def client_at(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root}/mlflow.db")


def run_named(root: Path, name: str) -> Any:
    client = client_at(root)
    experiment = client.get_experiment_by_name("ldm")
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return run


def steps_of(root: Path, name: str, metric: str) -> list[int]:
    history = client_at(root).get_metric_history(run_named(root, name).info.run_id, metric)
    return [point.step for point in history]


def test_a_pipeline_is_a_parent_run_with_nested_stage_runs(root: Path) -> None:
    tracker = tracker_at(root)
    tracker.start_pipeline("demo", {"seed": 7, "pairs": {"image_size": 64}}, {"ldm.command": "demo"})
    stage = tracker.stage("diffusion", "0123456789abcdef")
    stage.metrics({"loss/train": 0.5, "lr": 1e-4}, step=10)
    stage.metric("loss/train", 0.25, step=20)
    stage.image("preview", np.full((8, 12, 3), 200, np.uint8), step=20)
    stage.finish()
    report = root / "report.html"
    report.write_text("<p>fine</p>")
    tracker.pipeline.artifact(report)
    report.unlink()  # it was copied: what happens to it afterwards does not matter
    tracker.finish()

    assert tracker.close(60)

    parent, child = run_named(root, "demo"), run_named(root, "diffusion")
    assert parent.data.params == {"seed": "7", "pairs.image_size": "64"}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.tags["ldm.run"] == tracker.run_id
    assert child.data.tags["ldm.stage"] == "diffusion"
    assert child.data.tags["ldm.key"] == "0123456789abcdef"
    assert child.data.tags["ldm.run"] == stage.run_id
    assert child.data.metrics == {"loss/train": 0.25, "lr": 1e-4}
    assert parent.info.status == child.info.status == "FINISHED"
    names = [file.path for file in client_at(root).list_artifacts(parent.info.run_id)]
    assert sorted(names) == ["recipe.yaml", "report.html"]
    images = client_at(root).list_artifacts(child.info.run_id, "images")
    assert any("preview" in image.path and image.path.endswith(".png") for image in images)
    assert not list(root.glob("spool/*/*")), "what has arrived leaves the spool"


def test_importing_tracking_is_cheap() -> None:
    code = "import sys, pipelines.tracking; sys.exit(any(m in sys.modules for m in ('mlflow', 'torch', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_resumed_stage_goes_on_in_the_same_run(root: Path) -> None:
    first = tracker_at(root)
    first.start_pipeline("demo", {}, {})
    stage = first.stage("diffusion", "key")
    stage.metric("loss/train", 1.0, step=1)
    stage.finish("KILLED")
    assert first.close(60)

    second = tracker_at(root)
    second.start_pipeline("demo", {}, {}, resume_run_id=first.run_id)
    resumed = second.stage("diffusion", "key", resume_run_id=stage.run_id)
    resumed.metric("loss/train", 0.5, step=2)
    resumed.finish()
    assert second.close(60)

    assert steps_of(root, "diffusion", "loss/train") == [1, 2]
    assert run_named(root, "diffusion").info.status == "FINISHED"
    assert run_named(root, "demo").info.status == "RUNNING"


def test_steps_that_training_does_again_after_a_restart_are_in_mlflow_once(root: Path) -> None:
    first = tracker_at(root)
    first.start_pipeline("demo", {}, {})
    stage = first.stage("diffusion", "key")
    for step in (10, 20, 30, 20, 30, 40):  # a worker was lost at 30, and training went on from its checkpoint at 10
        stage.metric("loss/train", 1.0 / step, step=step)
    stage.metric("samples", 5.0)
    assert first.close(60)

    # The driver was killed at 40.
    second = tracker_at(root)
    resumed = second.stage("diffusion", "key", resume_run_id=stage.run_id)
    for step in (30, 40, 50):
        resumed.metric("loss/train", 1.0 / step, step=step)
        resumed.metric("only/late", 1.0, step=step)
    resumed.metric("samples", 7.0)
    assert second.close(60)

    assert steps_of(root, "diffusion", "loss/train") == [10, 20, 30, 40, 50]
    assert steps_of(root, "diffusion", "only/late") == [30, 40, 50]
    assert run_named(root, "diffusion").data.metrics["samples"] == 7.0, "a metric without steps may change"


def test_a_rate_is_logged_every_few_seconds_however_often_it_is_taken(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("pipelines.tracking.tracker.time.monotonic", lambda: now)
    tracker = tracker_at(root)
    tracker.start_pipeline("demo", {}, {})
    for step in range(1, 101):
        now = step / 10
        tracker.pipeline.rate("rows_per_s", 7.0, step)
        tracker.pipeline.rate("mb_per_s", 7.0, step)
    monkeypatch.undo()
    assert tracker.close(60)
    assert steps_of(root, "demo", "rows_per_s") == steps_of(root, "demo", "mb_per_s") == [1, 51]


def test_a_refused_event_does_not_hold_up_the_others(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = tracker_at(root)
    tracker.start_pipeline("demo", {"seed": 1}, {})
    tracker.pipeline.params({"seed": 2})  # MLflow never changes a parameter
    tracker.pipeline.metric("not a name!?", 1.0)
    tracker.pipeline.metric("fine", 1.0)
    assert tracker.close(60)
    assert run_named(root, "demo").data.metrics == {"fine": 1.0}
    assert "MLflow refused params seed" in caplog.text


WORK = """
    import itertools, sys
    from pathlib import Path
    import numpy as np
    from pipelines.store.storage import Storage
    from pipelines.tracking import Tracker
    from pipelines.tracking.config import TrackingConfig
    import time

    root = Path(sys.argv[1])
    tracker = Tracker(TrackingConfig(), Storage(str(root)), root / "spool")
    tracker.start_pipeline("demo", {}, {})
    stage = tracker.stage("diffusion", "key")
    for step in itertools.count():
        stage.metric("loss/train", 1.0 / (step + 1), step=step)
        if step % 100 == 0:
            stage.image("preview", np.zeros((4, 4, 3), np.uint8), step=step)
        print(stage.run_id, step, flush=True)
        time.sleep(0.002)
"""


DIES_IN_A_MIGRATION = """
    import os, signal
    from alembic.operations import Operations

    create_table = Operations.create_table

    def create_table_and_die(*arguments, **options):
        create_table(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    Operations.create_table = create_table_and_die
"""


def test_the_store_of_a_process_that_was_killed_while_mlflow_made_it_can_be_used(tmp_path: Path) -> None:
    program = textwrap.dedent(DIES_IN_A_MIGRATION) + textwrap.dedent(WORK)
    process = subprocess.run([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.DEVNULL, check=False)
    assert process.returncode == -signal.SIGKILL
    tracker = tracker_at(tmp_path)
    tracker.start_pipeline("after the kill", {}, {})
    tracker.finish()
    assert tracker.close(60)
    assert run_named(tmp_path, "after the kill").info.status == "FINISHED"


def test_what_a_killed_process_left_is_sent_by_the_next_one_exactly_once(root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORK), str(root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:  # kill it in the middle of sending: some has arrived, some has not
        lines.append(line)
        if list(root.glob("mlartifacts/*/artifacts/images/*")):
            break
    process.kill()
    run_id, last_step = (lines + process.stdout.readlines())[-1].split()
    process.wait()

    tracker = tracker_at(root)
    tracker.start_pipeline("demo again", {}, {})
    stage = tracker.stage("diffusion", "key", resume_run_id=run_id)
    stage.metric("loss/train", 0.0, step=int(last_step) + 1)
    stage.finish()
    tracker.finish()
    assert tracker.close(60)

    steps = steps_of(root, "diffusion", "loss/train")
    written = max(steps)  # the kill may fall between an event and the line that tells of it
    assert written - int(last_step) in (1, 2)
    assert sorted(set(steps)) == list(range(written + 1))
    assert len(steps) - len(set(steps)) <= 1
    run = run_named(root, "diffusion")
    assert run.info.status == "FINISHED"
    assert run_named(root, "demo").info.status == "KILLED"
    assert run.data.tags["mlflow.parentRunId"] == run_named(root, "demo again").info.run_id


SERVER = """
    import os, sys
    import uvicorn
    from mlflow.server.fastapi_app import app

    for _ in sys.stdin:
        process = os.fork()
        if process == 0:
            uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]))
            os._exit(0)
        print(process, flush=True)
        os.waitpid(process, 0)
"""


class MlflowServer:
    """MLflow's server on the root's store; starting it again after a kill costs a fork, not another 10 s of imports."""

    def __init__(self, root: Path, port: int) -> None:
        environment = {
            **os.environ,
            # What `mlflow server` sets for --backend-store-uri and --artifacts-destination.
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{root}/mlflow.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(root / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with open(root / "server.log", "ab") as log:
            self._parent = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(SERVER), str(port)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def start(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.write("start\n")
        self._parent.stdin.flush()

    def kill(self) -> None:
        assert self._parent.stdout is not None
        os.kill(int(self._parent.stdout.readline()), signal.SIGKILL)

    def __enter__(self) -> "MlflowServer":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._parent.pid, signal.SIGKILL)
        self._parent.communicate()


@contextlib.contextmanager
def port_of_ones_own() -> Iterator[int]:
    """Keep a port from all others while nobody listens on it; a server that sets SO_REUSEADDR may still take it."""
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield int(kept.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def log_like_training(stage: StageTracker, steps: range) -> None:
    """Log as a training loop does."""
    for step in steps:
        stage.metrics({"loss/train": 1.0, "lr": 1e-4}, step=step)
        if step % 25 == 0:
            stage.image("preview", np.zeros((256, 256, 3), np.uint8), step=step)
        time.sleep(0.01)


def test_an_outage_loses_nothing_and_blocks_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with port_of_ones_own() as port, MlflowServer(root, port) as server:
        tracker = tracker_at(root, uri=f"http://127.0.0.1:{port}")
        tracker.start_pipeline("demo", {}, {})
        stage = tracker.stage("diffusion", "key")
        server.start()
        log_like_training(stage, range(100))
        wait_until(lambda: any(root.glob("artifacts/**/images/preview*.png")))
        caplog.clear()
        server.kill()
        # Returns before there is anyone again who could answer.
        log_like_training(stage, range(100, 200))
        wait_until(lambda: "does not answer" in caplog.text)
        server.start()
        stage.finish()
        assert tracker.close(240)

    assert steps_of(root, "diffusion", "loss/train") == list(range(200))
    assert run_named(root, "diffusion").info.status == "FINISHED"
    images = {path.name.split("+")[2] for path in root.glob("artifacts/**/images/preview*.png")}
    assert images == {str(step) for step in range(0, 200, 25)}


def test_no_call_waits_for_an_answer_that_is_kept_back(tmp_path: Path) -> None:
    import mlflow  # noqa: F401  (the sender would be so late that there is no question yet)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = tracker_at(tmp_path, uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker.start_pipeline("demo", {}, {})
        stage = tracker.stage("diffusion", "key")
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(4) == b"GET "
            log_like_training(stage, range(100))
            # The sender still waits for this answer: it has not given up and asked again.
            silent.setblocking(False)
            with pytest.raises(BlockingIOError):
                silent.accept()
        assert not tracker.close(0.1)


def test_a_server_that_never_answers_costs_one_line_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with port_of_ones_own() as port:
        tracker = tracker_at(tmp_path, uri=f"http://127.0.0.1:{port}")
        tracker.start_pipeline("demo", {}, {})
        wait_until(lambda: "does not answer" in caplog.text)
        # Were there no limit to it, it would never return.
        assert not tracker.close(1.0)
    assert "the rest waits in" in caplog.text
    tracker.pipeline.metric("loss/train", 1.0)  # late calls are ignored
    assert list(tmp_path.glob("spool/*/session-*/events.jsonl"))


def test_tracking_that_is_switched_off_leaves_no_trace(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(enabled=False), Storage(str(tmp_path)), tmp_path / "spool")
    tracker.start_pipeline("demo", {}, {})
    stage = tracker.stage("pairs", "key")
    stage.metric("loss/train", 1.0)
    stage.image("preview", np.zeros((4, 4, 3), np.uint8), step=0)
    stage.finish()
    assert tracker.close()
    assert (stage.run_id, tracker.run_id) == (None, None)
    assert not list(tmp_path.iterdir())


def test_an_image_of_floats_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(H, W, 3\), got float32 \(4, 4, 3\)"):
        null_stage_tracker().image("preview", np.zeros((4, 4, 3), np.float32), step=0)
