"""Shards are packed by size and read as one; nothing that their index says is trusted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_core.weights.named_tensors import NamedTensors
from ldm_core.weights.weights_files import GIB, open_stem, write_weights

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(size) for name, size in (("a", 100), ("b", 100), ("c", 300), ("d", 50), ("e", 50))}


def write(folder: Path, limit_bytes: float | None = None) -> None:
    limit = None if limit_bytes is None else limit_bytes / GIB
    write_weights(NamedTensors.of_state(tensors()), folder, "model", max_shard_gib=limit)


def test_shards_keep_to_the_limit_and_a_larger_tensor_has_its_own(tmp_path: Path) -> None:
    write(tmp_path, 800)
    held = {path.name: list(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))}
    assert held == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d", "e"],
    }
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * 600
    assert index["weight_map"]["c"] == "model-00002-of-00003.safetensors"
    read = open_stem(tmp_path, "model")
    assert read is not None
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())


def test_writing_again_leaves_nothing_of_the_other_layout(tmp_path: Path) -> None:
    write(tmp_path, 800)
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    write(tmp_path, 800)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_tensor_is_read_only_when_it_is_looked_up() -> None:
    looked_up = []
    lazy = NamedTensors("x", {"a": (1,), "b": (1,)}, lambda name: looked_up.append(name) or torch.ones(1))
    renamed = lazy.renamed(lambda name: f"prefix.{name}").under("prefix.")
    assert not looked_up
    assert renamed["b"] == 1
    assert looked_up == ["b"]
    with pytest.raises(KeyError):
        renamed["c"]


def test_a_missing_shard_and_a_wrong_index_are_named(tmp_path: Path) -> None:
    write(tmp_path, 800)
    index = json.loads((tmp_path / INDEX).read_text())
    moved = index | {"weight_map": index["weight_map"] | {"f": "model-00001-of-00003.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(moved))
    with pytest.raises(ValueError, match="must list what its files hold, they differ in f"):
        open_stem(tmp_path, "model")
    save_file({"secret": torch.ones(1)}, tmp_path.parent / "outside.safetensors")
    for outside in ("../outside.safetensors", "/etc/passwd", "..", "a/b.safetensors"):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"secret": outside}}))
        with pytest.raises(ValueError, match="must name files beside it"):
            open_stem(tmp_path, "model")
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors"):
        open_stem(tmp_path, "model")
