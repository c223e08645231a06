"""Read PyTorch's pickled checkpoints (.ckpt, .pt, .bin) as data: tensors, containers, numbers and strings.

A pickle is a program that names functions and calls them. Here no name is ever imported: those that build tensors
resolve to the inert descriptions below, all others to placeholders that take any arguments and do nothing.
`torch.load(weights_only=True)` would be shorter, but it refuses files that name any other class, as those of Lightning
do, with which the paper's models were trained.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

ZIP_MAGIC = b"PK\x03\x04"
# torch.save before 1.6 begins with this number, pickled.
LEGACY_NUMBER = 0x1950A86A20F9469CFC6C
LEGACY_MAGIC = pickle.dumps(LEGACY_NUMBER, protocol=2)
LEGACY_PROTOCOL = 1001
MAX_PICKLE_BYTES = 2**30

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Foreign:
    """Placeholder for an object of a foreign class: it accepts whatever the pickle does to it and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _ignore(self, *_: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


class StoredTensor(NamedTuple):
    """A tensor that is still in the file: a strided view of a storage."""

    storage: str
    dtype: torch.dtype
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class PickledFile:
    """Content of a checkpoint; tensors are read when asked for.

    Attributes:
        root: the pickled object, with `StoredTensor` for tensors and `Foreign` for everything that is not data.
        read: reads a StoredTensor as a view of the file's pages (private: writing to it does not change the file).
    """

    root: Any
    read: Callable[[StoredTensor], Tensor]


def is_pickled(head: bytes) -> bool:
    """Return whether a file that begins with these bytes (at least 16) was written by torch.save."""
    return head.startswith((ZIP_MAGIC, LEGACY_MAGIC))


def open_pickled(path: str | Path) -> PickledFile:
    """Open a file that torch.save wrote, in today's zip layout or in the one before PyTorch 1.6.

    Args:
        path: the file.

    Returns:
        Its content; no tensor is read yet.

    Raises:
        ValueError: the file is of neither layout or damaged, or does what no checkpoint of tensors does.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(len(LEGACY_MAGIC))
            file.seek(0)
            if not is_pickled(head):
                raise ValueError("it begins with neither layout's mark")
            return _open_zip(path, file) if head.startswith(ZIP_MAGIC) else _open_legacy(file)
    except OSError:
        raise
    # Hostile bytes can make an unpickler raise anything else.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} must be a checkpoint that torch.save wrote, it cannot be read: {reason}") from error


# Everything that a pickle can reach has empty `__slots__`: there is no attribute that it could set to be called later.


class _Mapping(dict[Any, Any]):
    """An OrderedDict's items, without the attributes that modules hang on it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None: ...


class _BuildTensor:
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        if not isinstance(storage, StoredTensor):
            raise pickle.UnpicklingError("a tensor must be a view of a storage")
        sizes = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise pickle.UnpicklingError(f"a tensor's shape and stride must be sizes, got {shape}, {stride}")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= storage.numel:
            raise pickle.UnpicklingError(f"a tensor of shape {shape} does not fit its storage of {storage.numel}")
        return storage._replace(offset=offset, shape=tuple(shape), stride=tuple(stride))


class _BuildParameter:
    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _Mapping,
    ("torch._utils", "_rebuild_tensor"): _BuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _BuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _BuildParameter(),
    ("torch._utils", "_rebuild_parameter_with_state"): _BuildParameter(),
}


class _DataUnpickler(pickle.Unpickler):
    """Imports nothing: every global is one of ours or a placeholder."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storages: dict[str, torch.dtype] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and global_name in DTYPES:
            return DTYPES[global_name]
        if known := _KNOWN.get((module_name, global_name)):
            return known
        return type("Foreign", (Foreign,), {"origin": f"{module_name}.{global_name}"})

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(each is not None for each in view):
            raise pickle.UnpicklingError(f"storage {str(pid)[:80]!r} is of no kind that holds weights")
        if not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError(f"storage {key!r} must have a size, got {numel!r}")
        if self.storages.setdefault(str(key), dtype) != dtype:
            raise pickle.UnpicklingError(f"storage {key!r} is of two types")
        return StoredTensor(str(key), dtype, numel, 0, (numel,), (1,))


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, torch.dtype]]:
    """Read the next pickled object of a file, and the type of every storage that it names."""
    start = file.tell()
    largest = max((arg for opcode, arg, _ in pickletools.genops(file) if "PUT" in opcode.name and arg), default=0)
    # The unpickler allocates its memo for the largest index named, however short the pickle.
    if largest > file.tell() - start:
        raise pickle.UnpicklingError("its memo is larger than itself")
    file.seek(start)
    unpickler = _DataUnpickler(file)
    return unpickler.load(), unpickler.storages


def _open_zip(path: Path, file: IO[bytes]) -> PickledFile:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("its archive must hold one data.pkl")
        prefix = pickles[0].removesuffix("data.pkl")
        # torch.save compresses nothing; a compressed record is a bomb or a file packed by hand.
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise ValueError("its archive must be uncompressed")
        if records[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise ValueError("its data.pkl is larger than any checkpoint's")
        if f"{prefix}byteorder" in records and archive.read(f"{prefix}byteorder") != b"little":
            raise ValueError("its numbers must be little-endian")
        root, _ = _unpickle(io.BytesIO(archive.read(pickles[0])))
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def locate(key: str) -> tuple[int, int]:
        record = records.get(f"{prefix}data/{key}")
        if record is None:
            raise ValueError(f"{path} lacks its storage {key!r}: was it copied to the end?")
        # The local header's name and extra field lie between the entry's offset and its data.
        name_bytes, extra_bytes = struct.unpack_from("<HH", pages, record.header_offset + 26)
        return record.header_offset + 30 + name_bytes + extra_bytes, record.file_size

    return PickledFile(root, lambda tensor: _read(pages, tensor, *locate(tensor.storage)))


def _open_legacy(file: IO[bytes]) -> PickledFile:
    for expected in (LEGACY_NUMBER, LEGACY_PROTOCOL):
        if _unpickle(file)[0] != expected:
            raise ValueError("its header is of no known version")
    system, _ = _unpickle(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers must be little-endian")
    root, dtypes = _unpickle(file)
    places: dict[str, tuple[int, int]] = {}
    for key in _unpickle(file)[0]:
        (numel,) = struct.unpack("<q", file.read(8))
        size = numel * dtypes[key].itemsize
        places[key] = (file.tell(), size)
        file.seek(size, 1)
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return PickledFile(root, lambda tensor: _read(pages, tensor, *places[tensor.storage]))


def _read(pages: mmap.mmap, tensor: StoredTensor, start: int, size: int) -> Tensor:
    if not 0 <= start <= start + size <= len(pages) or size < tensor.numel * tensor.dtype.itemsize:
        raise ValueError(f"the checkpoint ends before its storage {tensor.storage!r}: was it copied to the end?")
    if not math.prod(tensor.shape):
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    storage = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel, offset=start)
    # Before PyTorch 1.6 storages begin anywhere, and networks compute with what is read here.
    storage = storage.clone() if start % tensor.dtype.itemsize else storage
    return storage.as_strided(tensor.shape, tensor.stride, tensor.offset)
