"""Mistakes of the world become one line, whichever library met them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
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
