"""Read weights files, .safetensors or torch.save's, one tensor at a time; write .safetensors, whole or in shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_core.weights.named_tensors import NamedTensors, merged, some
from ldm_core.weights.pickled import StoredTensor, is_pickled, open_pickled

GIB = 2**30


def open_tensors(path: str | Path) -> NamedTensors:
    """Open a .safetensors file or one of torch.save; its content decides which, not its name.

    Args:
        path: the file. A pickled one may hold the weights under "state_dict" or be the state dict itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, is damaged, or holds anything but named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    with path.open("rb") as file:
        head = file.read(16)
    if is_pickled(head):
        return _open_pickled(path)
    # A safetensors file begins with the length of a JSON object.
    if head[8:9] != b"{" and path.suffix != ".safetensors":
        raise ValueError(f"{path} must be what torch.save wrote, or a safetensors file: it begins with {head[:8]!r}")
    return open_safetensors(path)


def open_safetensors(path: str | Path, *, device: str = "cpu") -> NamedTensors:
    """Open one .safetensors file, to be read to the device. Raises as `open_tensors`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        # Never closed, as the tensors are read later; an open file costs no more than a mapping of its pages.
        file = ExitStack().enter_context(safe_open(path, framework="pt", device=device))
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, it is not: {error}") from error
    return NamedTensors(str(path), shapes, file.get_tensor)


def open_sharded(index: str | Path, *, open_shard: Callable[[Path], NamedTensors]) -> NamedTensors:
    """Open the shards that an index.json beside them lists, as one mapping.

    Args:
        index: JSON with a `weight_map` from tensor names to names of files in the same folder.
        open_shard: opens one of these files.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the index is not one, or its shards hold other tensors than it lists.
    """
    index = Path(index)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} must map tensor names to files under weight_map")
    files = sorted(set(weight_map.values()))
    # An index may come from anybody: it must not reach files outside its folder.
    if outside := [name for name in files if Path(name).name != name or name in ("", ".", "..")]:
        raise ValueError(f"{index} must name files beside it, got {some(outside)}")
    tensors = merged(str(index), [open_shard(index.parent / name) for name in files])
    if odd := sorted(tensors.shapes.keys() ^ weight_map.keys()):
        raise ValueError(f"{index} must list what its files hold, they differ in {some(odd)}")
    return tensors


def open_stem(folder: Path, stem: str, *, device: str = "cpu") -> NamedTensors | None:
    """Open STEM.safetensors of a folder, or the shards of STEM.safetensors.index.json; None if there is neither.

    Raises as `open_tensors` and `open_sharded`.
    """
    if (whole := folder / f"{stem}.safetensors").is_file():
        return open_safetensors(whole, device=device)
    if (index := folder / f"{stem}.safetensors.index.json").is_file():
        return open_sharded(index, open_shard=lambda path: open_safetensors(path, device=device))
    return None


def open_foreign_weights(folder: Path, *stems: str) -> NamedTensors | None:
    """Open the weights in another program's folder under the first stem found, .safetensors before .bin.

    Raises as `open_tensors` and `open_sharded`.
    """
    for stem in stems:
        if weights := open_stem(folder, stem):
            return weights
    for stem in stems:
        if (whole := folder / f"{stem}.bin").is_file():
            return open_tensors(whole)
        if (index := folder / f"{stem}.bin.index.json").is_file():
            return open_sharded(index, open_shard=open_tensors)
    return None


def write_weights(tensors: NamedTensors, folder: Path, stem: str, *, max_shard_gib: float | None = None) -> None:
    """Write STEM.safetensors in float32, or shards and their index if that file would be too large.

    No more than one shard is in memory at a time.

    Args:
        tensors: float32, float16 or bfloat16 of any memory format on any device; integers are kept as they are.
        folder: where to write; weights of the same stem are removed first.
        stem: the file's name without its extension.
        max_shard_gib: size of the largest file in GiB (2**30 bytes); None is one file whatever its size.

    Raises:
        ValueError: a tensor holds NaN or infinity, or float64 (which float32 cannot hold exactly); all are named.
    """
    for old in [*folder.glob(f"{stem}-*-of-*.safetensors"), *folder.glob(f"{stem}.safetensors*")]:
        old.unlink()
    shards = _shards(tensors, math.inf if max_shard_gib is None else max_shard_gib * GIB)
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [f"{stem}.safetensors"]
    broken: list[str] = []
    for file, shard in zip(names, shards, strict=True):
        weights = {name: _plain(tensors[name], name) for name in shard}
        broken += [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if not broken:
            save_file(weights, folder / file, metadata={"format": "pt"})
    if broken:
        raise ValueError(
            f"weights must be finite numbers, those of {tensors.source} hold NaN or infinity in {some(broken)}"
        )
    if len(shards) > 1:
        total = sum(_float32_bytes(shape) for shape in tensors.shapes.values())
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises FileNotFoundError, or ValueError if the file holds anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, it is not: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with sorted keys to a file; its folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: NamedTensors, limit: float) -> list[list[str]]:
    """Pack names, in order, into files of at most `limit` bytes; a larger tensor gets a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in tensors.shapes.items():
        needed = _float32_bytes(shape)
        if shards[-1] and size + needed > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    return shards


def _float32_bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def _plain(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor as contiguous float32 on the CPU: the same bytes, whatever it was trained on and in."""
    if tensor.dtype == torch.float64:
        raise ValueError(f"weights must be float32, float16 or bfloat16, {name} is float64: round it first")
    tensor = tensor.detach().to("cpu")
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def _open_pickled(path: Path) -> NamedTensors:
    content = open_pickled(path)
    root = content.root
    state = root["state_dict"] if isinstance(root, dict) and "state_dict" in root else root
    if not isinstance(state, dict) or not any(isinstance(value, StoredTensor) for value in state.values()):
        held = some([str(key) for key in root]) if isinstance(root, dict) else type(root).__name__
        raise ValueError(f"{path} must hold named tensors, or such under state_dict, it holds {held or 'nothing'}")
    if strange := [str(name) for name, value in state.items() if not isinstance(value, StoredTensor)]:
        raise ValueError(f"the weights in {path} must be tensors, these are not: {some(strange)}")
    shapes = {str(name): tensor.shape for name, tensor in state.items()}
    return NamedTensors(str(path), shapes, lambda name: content.read(state[name]))
