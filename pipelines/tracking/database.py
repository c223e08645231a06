"""MLflow's SQLite database, which appears whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipelines.store.storage import Storage

SQLITE = "sqlite:///"


def make_database(uri: str, artifacts: str) -> None:
    """Make the SQLite database of a tracking URI, unless there is one.

    MLflow itself makes it under its final name by some fifty migrations, each of which SQLite commits on its own. Of a
    process that is killed among them it leaves tables that no later migration accepts: the database could never be
    used again.

    Args:
        uri: MLflow's tracking URI; one that is not just `sqlite:///` and a path is left to MLflow.
        artifacts: URI for the artifacts of MLflow's default experiment.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or "?" in uri or path.exists():
        return
    # A journal whose database was removed would be played into the new one. Now, not later: by then another process may
    # have made the database, and this would be its journal.
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix="ldm-mlflow-") as folder:
        made = Path(folder) / path.name
        SqlAlchemyStore(f"{SQLITE}{made}", artifacts).engine.dispose()
        # If another process was faster, its database stands.
        Storage(str(path.parent)).create(path.name, made.read_bytes())
