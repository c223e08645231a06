"""Where MLflow's store of a root is: it survives, and a password on the way to it is told to nobody."""

from pathlib import Path

import pytest

from pipelines.errors import MisuseError, UserError
from pipelines.store.storage import Storage
from pipelines.tracking import Tracker, home, spool_folder, store
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.places import JOB_VARIABLE, URI_VARIABLE

SECRET = "never-to-be-seen"
BUCKET = Storage("s3://bucket/experiments/faces")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_store_of_a_local_root_is_in_it(tmp_path: Path) -> None:
    assert store(TrackingConfig(), Storage(str(tmp_path))) == (
        f"sqlite:///{tmp_path}/mlflow.db",
        f"file://{tmp_path}/mlartifacts",
    )
    assert spool_folder(Storage(str(tmp_path))) == tmp_path / ".tracking"


def test_the_store_of_a_remote_root_is_in_a_folder_of_the_user_that_every_run_finds_again(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = home(BUCKET)
    assert folder.parent == own_home
    assert folder.name.startswith("faces-")
    assert store(TrackingConfig(), BUCKET)[0] == f"sqlite:///{folder}/mlflow.db"
    assert spool_folder(BUCKET).parent == folder
    monkeypatch.chdir(tmp_path)
    assert home(Storage("s3://bucket/experiments/faces/")) == folder
    assert home(Storage("s3://bucket/other/faces")) != folder
    monkeypatch.delenv("LDM_HOME")
    assert home(BUCKET) == Path("~/.local/share/ldm").expanduser() / folder.name


def test_a_job_whose_store_would_go_with_its_node_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remedy = "set tracking.uri, or MLFLOW_TRACKING_URI here and on the cluster, or tracking.enabled=false"
    with pytest.raises(MisuseError, match=remedy):
        store(TrackingConfig(), BUCKET, in_job=True)
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    with pytest.raises(MisuseError, match=remedy):
        store(TrackingConfig(), BUCKET)
    assert store(TrackingConfig(uri="http://mlflow:5000"), BUCKET) == ("http://mlflow:5000", None)
    assert store(TrackingConfig(), Storage(str(tmp_path)))[0].startswith("sqlite:///")
    monkeypatch.setenv(URI_VARIABLE, "http://mlflow:5000")
    assert store(TrackingConfig(), BUCKET) == ("http://mlflow:5000", None)


def test_the_environment_names_the_server_where_the_recipe_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(URI_VARIABLE, f"http://user:{SECRET}@mlflow:5000")
    root = Storage(str(tmp_path))
    assert store(TrackingConfig(), root) == (f"http://user:{SECRET}@mlflow:5000", None)
    assert store(TrackingConfig(uri="http://other:5000"), root) == ("http://other:5000", None)


def test_the_password_of_a_server_that_does_not_answer_is_neither_said_nor_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow  # noqa: F401  (a sender that is still importing it would not have tried yet)

    for uri in (
        f"http://user:{SECRET}@127.0.0.1:9",
        f"http://user:{SECRET}/slash@127.0.0.1:9",
        f"nonsense://a:{SECRET}@b",
    ):
        monkeypatch.setenv(URI_VARIABLE, uri)
        tracker = Tracker(TrackingConfig(), Storage(str(tmp_path)), tmp_path / "spool")
        tracker.start_pipeline("demo", {}, {})
        tracker.close(1.0)
    assert "MLflow at http://user:***@127.0.0.1:9 does not answer" in caplog.text
    assert "unsupported URI 'nonsense://a:***@b'" in caplog.text
    assert SECRET not in caplog.text
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert not any(SECRET.encode() in path.read_bytes() for path in kept)


def test_a_new_password_finds_the_events_that_wait_for_the_same_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for password in ("first-password", "second-password"):
        monkeypatch.setenv(URI_VARIABLE, f"http://user:{password}@127.0.0.1:9")
        Tracker(TrackingConfig(), Storage(str(tmp_path)), tmp_path / "spool").close(0.1)
    assert len(list((tmp_path / "spool").iterdir())) == 1


def test_a_home_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_HOME", "/sys/ldm")  # where not even root may make a folder
    with pytest.raises(UserError, match=r"/sys/ldm/.*: set LDM_HOME to another folder, or tracking\.enabled=false"):
        Tracker(TrackingConfig(), BUCKET, spool_folder(BUCKET))
