"""Final files of a training stage, committed once: a run that was killed after its commit does not write them again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.store.ledger import DETAILS, ArtifactWriter

# Written last and not committed, since it holds timings: its existence says that training is finished.
DETAILS_FILE = DETAILS
HISTORY_FILE = "history.json"
TRAIN_FOLDER = "train"


def commit_once(writer: ArtifactWriter, name: str, write: Callable[[Path], Any]) -> None:
    """Commit a file, written by `write(local path)`, unless it is committed already."""
    if name in writer.committed():
        return
    with writer.storage.writer(name) as path:
        write(path)
    writer.commit(name)
