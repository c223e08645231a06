"""Honest and hostile pickles: tensors are read, nothing is executed, and an unreadable file is one clear error."""

import io
import os
import pickle
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm_core.weights.pickled import Foreign, StoredTensor, open_pickled

LAYOUTS = {"zip": True, "before 1.6": False}


def save(content: Any, path: Path, *, layout: str = "zip") -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, path, _use_new_zipfile_serialization=LAYOUTS[layout])
    return path


def zip_around(pickled: bytes, path: Path, *, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a checkpoint in today's zip layout around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", b"\0" * 64)
    return path


class Calls:
    """An object that pickles as a call of the given function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_every_kind_are_read_bit_for_bit(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tensors = {
        "plain": base,
        "a view": base[1:3, ::2],
        "transposed": base.t(),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "double": torch.randn(2).double(),
        "integers": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "a number": torch.tensor(0.18215),
        "nothing": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "channels last": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    file = open_pickled(save({"state_dict": OrderedDict(tensors), "epoch": 3}, tmp_path / "x.ckpt", layout=layout))
    assert file.root["epoch"] == 3
    assert file.root["state_dict"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = file.root["state_dict"][name]
        assert stored.shape == tuple(tensor.shape)
        found = file.read(stored)
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_objects_of_foreign_classes_become_placeholders_and_their_modules_are_never_imported(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "foreign_lightning.py"
    module.write_text(
        "class Callback:\n    def __init__(self): self.best = 0.5\n"
        "class Config(dict): pass\n"
        "class History(list): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    foreign = __import__("foreign_lightning")
    content = {
        "callbacks": {foreign.Callback: foreign.Callback()},
        "config": foreign.Config(a=foreign.History([1, 2])),
        "state_dict": {"weight": torch.ones(2)},
    }
    path = save(content, tmp_path / "x.ckpt", layout=layout)
    module.write_text("raise SystemExit('imported')")
    monkeypatch.delitem(sys.modules, "foreign_lightning")
    file = open_pickled(path)
    assert "foreign_lightning" not in sys.modules
    assert isinstance(file.root["config"], Foreign)
    assert [isinstance(value, Foreign) for value in file.root["callbacks"].values()] == [True]
    assert torch.equal(file.read(file.root["state_dict"]["weight"]), torch.ones(2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "attack",
    [
        lambda mark: Calls(os.system, f"touch {mark}"),
        lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"),
        lambda mark: Calls(open, str(mark), "w"),
        lambda mark: Calls(torch.save, torch.ones(1), str(mark)),
        lambda mark: Calls(torch.load, str(mark.parent / "nested.pt")),
        lambda mark: Calls(torch.hub.download_url_to_file, f"file://{__file__}", str(mark)),
        lambda mark: Calls(getattr, Calls(__import__, "os"), "system"),
        lambda mark: Calls(torch.set_default_dtype, torch.float64),
        lambda mark: Calls(pickle.loads, pickle.dumps(Calls(open, str(mark), "w"))),
    ],
    ids=[
        "os.system",
        "eval",
        "exec",
        "open",
        "torch.save",
        "torch.load",
        "torch.hub",
        "getattr",
        "torch state",
        "loads",
    ],
)
def test_no_function_that_a_pickle_names_is_called(tmp_path: Path, attack: Callable[[Path], Any], layout: str) -> None:
    mark = tmp_path / "mark"
    save(Calls(open, str(mark), "w"), tmp_path / "nested.pt")
    path = save({"weight": torch.ones(2), "attack": attack(mark)}, tmp_path / "x.ckpt", layout=layout)
    file = open_pickled(path)
    assert not mark.exists()
    assert torch.get_default_dtype() == torch.float32
    assert isinstance(file.root["attack"], Foreign)
    assert torch.equal(file.read(file.root["weight"]), torch.ones(2))


def tensor_pickle(arguments: tuple[Any, ...]) -> bytes:
    """Return a pickled `_rebuild_tensor_v2` of storage "0" (16 floats) with these arguments after the storage."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 16) if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": Calls(torch._utils._rebuild_tensor_v2, Storage(), *arguments)})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (17,), (1,), False, {}), "does not fit its storage"),
        ((8, (4, 4), (4, 1), False, {}), "does not fit its storage"),
        ((0, (2, 10**12), (1, 10**12), False, {}), "does not fit its storage"),
        ((0, (4,), (-1,), False, {}), "must be sizes"),
        ((-4, (4,), (1,), False, {}), "must be sizes"),
        ((0, (4, 4), (1,), False, {}), "must be sizes"),
        ((0, ("4",), (1,), False, {}), "must be sizes"),
    ],
)
def test_tensors_that_reach_outside_of_their_storage_are_refused(
    tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_pickled(zip_around(tensor_pickle(arguments), tmp_path / "x.ckpt"))


def test_a_storage_that_is_not_there_or_too_short_is_named(tmp_path: Path) -> None:
    long = tensor_pickle((0, (16,), (1,), False, {})).replace(b"K\x10", b"K\x40")
    file = open_pickled(zip_around(long, tmp_path / "long.ckpt"))
    with pytest.raises(ValueError, match="ends before its storage '0'"):
        file.read(file.root["w"])
    absent = StoredTensor("7", torch.float32, 1, 0, (1,), (1,))
    with pytest.raises(ValueError, match="lacks its storage '7'"):
        file.read(absent)


def test_attributes_that_a_pickle_sets_on_what_it_was_given_are_refused_or_lost(tmp_path: Path) -> None:
    # BUILD on the function that makes tensors, and on an OrderedDict whose `items` would shadow the real ones.
    on_function = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb."
    with pytest.raises(ValueError, match="cannot be read"):
        open_pickled(zip_around(on_function, tmp_path / "a.ckpt"))
    on_mapping = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    root = open_pickled(zip_around(on_mapping, tmp_path / "b.ckpt")).root
    assert list(root.items()) == []


def test_bombs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be uncompressed"):
        open_pickled(zip_around(b"\x80\x02N.", tmp_path / "zip.ckpt", compression=zipfile.ZIP_DEFLATED))
    # One opcode that would make the unpickler allocate 2**32 places for its memo.
    memo = b"\x80\x02N" + b"r" + struct.pack("<I", 2**31) + b"."
    with pytest.raises(ValueError, match="memo is larger than itself"):
        open_pickled(zip_around(memo, tmp_path / "memo.ckpt"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path: Path, layout: str) -> None:
    whole = save({"weight": torch.randn(64)}, tmp_path / "whole.ckpt", layout=layout).read_bytes()
    for size in (20, 60, len(whole) // 3, len(whole) - 100):
        (tmp_path / "cut.ckpt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.ckpt must be a checkpoint|ends before its storage") as error:
            read_weight(tmp_path / "cut.ckpt")
        assert "\n" not in str(error.value)


def read_weight(path: Path) -> torch.Tensor:
    file = open_pickled(path)
    return file.read(file.root["weight"])


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for name, content in {"text": b"hello world, hello world", "empty": b"", "pickle": pickle.dumps({"a": 1})}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"must be a checkpoint that torch\.save wrote"):
            open_pickled(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(ValueError, match=r"must hold one data\.pkl"):
        open_pickled(tmp_path / "other.zip")
