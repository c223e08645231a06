"""MLflow's SQLite database: what is left to MLflow, and what an earlier database left behind."""

from pathlib import Path

from pipelines.tracking.database import make_database


def test_a_uri_that_is_more_than_a_path_is_left_to_mlflow(tmp_path: Path) -> None:
    for uri in (f"sqlite:///{tmp_path}/mlflow.db?timeout=30", "http://mlflow:5000", "postgresql://mlflow@db/mlflow"):
        make_database(uri, "file:///artifacts")
    assert list(tmp_path.iterdir()) == []


def test_the_journal_of_a_database_that_was_removed_does_not_reach_the_new_one(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    journal = tmp_path / "runs" / "mlflow.db-journal"
    journal.parent.mkdir()
    journal.write_bytes(bytes.fromhex("d9d505f920a163d7") + bytes(1024))
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    make_database(uri, f"file://{tmp_path}/mlartifacts")
    assert not journal.exists()
    written = (tmp_path / "runs" / "mlflow.db").read_bytes()
    make_database(uri, "file:///elsewhere")
    assert (tmp_path / "runs" / "mlflow.db").read_bytes() == written
    (experiment,) = MlflowClient(uri).search_experiments()
    assert experiment.artifact_location == f"file://{tmp_path}/mlartifacts/0"
