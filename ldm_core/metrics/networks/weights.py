"""Read and digest the weights files of the metrics' networks, without running anything inside them."""

import hashlib
import io
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor


class MetricUnavailableError(RuntimeError):
    """A metric lacks a file or a library. The message is one line that says which, and where to get it."""


def read_weights(path: Path, *, content: str) -> tuple[dict[str, Tensor], str]:
    """Read a file of named tensors: safetensors, or what torch.save wrote of a state dict.

    Args:
        path: the file; .safetensors by its name, everything else is read as torch.save's.
        content: description of what it should hold, for the errors.

    Returns:
        The tensors on the CPU by name, and the file's sha256 in hex.

    Raises:
        MetricUnavailableError: if there is no such file.
        ValueError: if the file holds anything but named tensors.
    """
    if not path.is_file():
        raise MetricUnavailableError(f"no file {path} with {content}")
    # Read once, so that the digest is of the very bytes that are loaded.
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load(data)
        else:
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} must hold the named tensors of {content}, but does not read as such") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} must hold only the named tensors of {content}, got {type(tensors).__name__}")
    return dict(tensors), hashlib.sha256(data).hexdigest()


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return the sha256 in hex of the names and contents of files, whatever their order or folder."""
    whole = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
