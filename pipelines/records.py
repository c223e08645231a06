"""The shard format: plain WebDataset tars whose bytes depend on nothing but their contents.

A sample is a key and its files by extension: `000070042` and `{"jpg": …, "txt": …, "json": …}` are stored as
the members `000070042.jpg`, `000070042.json`, `000070042.txt`, next to each other: plain WebDataset.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from pipelines.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "webp", "png")


def write_shard(path: Path | str, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write a tar of samples in the order given; the same samples give the same bytes on any machine.

    Args:
        path: a local file, written in place (put it under `Storage.writer` to make it appear whole).
        samples: pairs of key (unique, without dots or slashes) and the sample's files by extension.

    Returns:
        How many samples were written.
    """
    seen: set[str] = set()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, files in samples:
            # webdataset takes everything up to the first dot of the file name as the key.
            assert not set("./") & set(key), f"bad sample key {key!r}"
            assert key not in seen, f"sample key {key} written twice"
            seen.add(key)
            for extension in sorted(files):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mode = len(files[extension]), 0o644
                tar.addfile(member, io.BytesIO(files[extension]))
    return len(seen)


def read_shard(file: BinaryIO | Path | str) -> Iterator[dict[str, Any]]:
    """Read samples one after the other: `{"__key__": str, extension: bytes, …}`.

    Args:
        file: a local path or an open, seekable binary file.

    Raises:
        UserError: the tar is truncated or damaged; names the shard. Raised where the damage is met.
    """
    if isinstance(file, str | Path):
        try:
            with open(file, "rb") as opened:
                yield from read_shard(opened)
        except FileNotFoundError:
            raise UserError(f"shard {file} is missing") from None
        return
    sample: dict[str, Any] = {}
    for name, data in _members(file):
        key, _, extension = name.partition(".")
        if sample.get("__key__") != key:
            if sample:
                yield sample
            sample = {"__key__": key}
        sample[extension] = data
    if sample:
        yield sample


def _members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    name = getattr(file, "name", None) or getattr(file, "path", "shard")
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, cast(BinaryIO, tar.extractfile(member)).read()
            require_end_of_archive(tar, file)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"shard {name} is truncated or damaged ({error}): remove it and make it again") from error


def require_end_of_archive(tar: tarfile.TarFile, file: BinaryIO) -> None:
    """After the last member: raise tarfile.ReadError unless the end mark follows.

    tarfile takes a cut between two members, or a damaged header, for the end of the archive.
    """
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end-of-archive mark")


def encode_npy(array: np.ndarray) -> bytes:
    """An array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_npy(data: bytes) -> np.ndarray:
    """The array of an .npy file; never unpickles.

    Raises:
        ValueError: not an .npy file, truncated, or an array of Python objects.
    """
    try:
        return cast(np.ndarray, np.load(io.BytesIO(data), allow_pickle=False))
    except EOFError as error:
        raise ValueError(f"not a whole .npy file ({len(data)} bytes): {error}") from error


def decode_image(data: bytes) -> np.ndarray:
    """A picture stored in a shard as uint8 (H, W, 3) RGB."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def image_of(sample: Mapping[str, Any]) -> bytes:
    """The encoded picture of a pairs sample, whichever of the formats it is stored in.

    Raises:
        UserError: the sample has no picture.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return cast(bytes, sample[extension])
    raise UserError(
        f"sample {sample.get('__key__')} has no picture ({', '.join(IMAGE_EXTENSIONS)}): has {sorted(sample)}"
    )
