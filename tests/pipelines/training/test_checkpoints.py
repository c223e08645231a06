"""Which checkpoint a run goes on from, and which attempts are cleared away."""

from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from pipelines.store.storage import Storage
from pipelines.training.checkpoints import STATE_FILE, discard_attempts, load, newest


def checkpoint(train: Storage, attempt: str, step: int) -> Storage:
    folder = train / attempt / f"step_{step:08d}"
    with folder.writer(STATE_FILE) as path:
        torch.save({"step": step}, path)
    return folder


def test_the_newest_whole_checkpoint_of_all_attempts_is_found(tmp_path: Path) -> None:
    train = Storage(str(tmp_path / "train"))
    assert newest(train) is None
    checkpoint(train, "attempt_b", 500)
    expected = checkpoint(train, "attempt_a", 1500)
    checkpoint(train, "attempt_c", 1000)
    # What kill -9 leaves behind while the next one is being put in place.
    unfinished = Path((train / "attempt_c" / "step_00002000").path())
    unfinished.mkdir()
    (unfinished / f".{STATE_FILE}.123.tmp").write_bytes(b"half")
    (tmp_path / "train/attempt_c/checkpoint_manager_snapshot.json").write_bytes(b"")
    assert newest(train) == expected.url
    assert load(Storage(expected.url), torch.device("cpu")) == {"step": 1500}


def test_earlier_attempts_go_but_the_one_to_resume_from_stays(tmp_path: Path) -> None:
    train = Storage(str(tmp_path / "train"))
    kept = checkpoint(train, "attempt_1", 10)
    checkpoint(train, "attempt_10", 5)
    discard_attempts(train, keep=kept.url)
    assert train.names() == ["attempt_1"]
    discard_attempts(train, keep=None)
    assert train.names() == []


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = checkpoint(Storage(str(tmp_path)), "attempt", 7)
    Path(folder.path(STATE_FILE)).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"step_00000007 is damaged \(.*remove it and run the same command"):
        load(folder, torch.device("cpu"))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path / "step_00000001"))
    with folder.writer(STATE_FILE) as path:
        torch.save({"step": Path("anything but tensors and plain values")}, path)
    with pytest.raises(UserError, match="is damaged"):
        load(folder, torch.device("cpu"))
