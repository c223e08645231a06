"""Errors that a person can mend become one line, whichever library raised them and whatever wraps them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from safetensors.torch import save_file

from pipelines.errors import UserError, explain

WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda folder: save_file({"weight": torch.zeros(200_000)}, folder / "model.safetensors"),
    "torch": lambda folder: torch.save({"weight": torch.zeros(200_000)}, folder / "model.pt"),
    "python": lambda folder: (folder / "file").write_bytes(bytes(800_000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_whoever_wrote(name: str, full_disk: Path) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        WRITERS[name](full_disk)
    known = explain(caught.value)
    assert isinstance(known, UserError)
    assert str(known).startswith("disk full")


def test_a_bug_stays_a_bug() -> None:
    assert explain(RuntimeError("unexpected pos")) is None
    assert explain(KeyError("No space")) is None


def test_the_worker_whose_error_a_person_can_mend_is_found_whatever_its_rank() -> None:
    known = UserError("lower the learning rate")
    other = RuntimeError("connection closed by peer")
    assert explain(WorkerGroupError("two workers failed", {0: other, 1: known, 2: other})) is known
    assert explain(WorkerGroupError("two workers failed", {0: other, 1: other})) is None


def test_an_error_is_found_inside_all_that_ray_wraps_around_it() -> None:
    known = UserError("free some space")
    task = RayTaskError("train", "Traceback ...", known).as_instanceof_cause()
    assert explain(ControllerError(WorkerGroupError("a worker failed", {0: task}))) is known


def test_what_was_raised_in_place_of_an_error_leads_to_it() -> None:
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = UserError("give another file")
    assert explain(wrapped) is wrapped.__cause__
