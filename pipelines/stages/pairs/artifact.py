"""The pairs artifact as later stages read it: format version, pictures and captions."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from pipelines.errors import UserError
from pipelines.shards.format import decode_json
from pipelines.shards.order import Place
from pipelines.shards.reader import ShardReader
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.stages.pairs.pictures.formats import STORED
from pipelines.store.failures import MissingFileError
from pipelines.store.ledger import Artifact
from pipelines.store.storage import sha256_file

CACHE_BYTES = 1 << 30
MOST_PIXELS = 100_000_000
_STORED_FORMATS = ("JPEG", "WEBP", "PNG")


def count_shards(pairs: Artifact) -> int:
    """Count the shards of a pairs artifact, which are numbered from 0 on."""
    # By their tables: with buckets a shard has several tars. Tables of something else lie in folders of their own.
    return sum("/" not in name for name in pairs.shards(".parquet").names)


def open_pairs(pairs: Artifact) -> ShardReader:
    """Open the shards of a pairs artifact.

    Raises:
        UserError: it is of another stage or another format, or holds no samples.
    """
    reader = ShardReader(pairs.storage, pairs.require("pairs", PAIRS_FORMAT).files)
    if not reader.rows_per_shard.sum():
        raise UserError(f"{pairs.storage.url} holds no samples: see its parquet files for what became of each row")
    return reader


@contextlib.contextmanager
def whole_shard(pairs: Artifact, name: str, sha256: str) -> Iterator[Path]:
    """Yield a local path of a shard whose bytes are those that were committed.

    What is made of it is known by that digest, so that it must not be made of anything else.

    Raises:
        UserError: the shard is missing or damaged.
    """
    try:
        with pairs.storage.local_copy(name) as path:
            if (found := sha256_file(path)) != sha256:
                raise damaged_pairs(pairs, name, f"has the sha256 {found[:12]}… instead of {sha256[:12]}…")
            yield path
    except MissingFileError:
        raise damaged_pairs(pairs, name, "is missing") from None


def damaged_pairs(pairs: Artifact, name: str, problem: str) -> UserError:
    """Return the error for a shard that is not as it was committed."""
    return UserError(
        f"{pairs.storage.url}/{name} {problem}: it was damaged after it was committed; run `ldm run RECIPE --force "
        "pairs` to rebuild it"
    )


class Pictures:
    """Decoded pictures by (shard, row), kept in memory as long as they fit. Safe to use from several threads.

    Args:
        reader: reads the pairs' shards.
        cache_bytes: memory for decoded pictures; the first ones stay, as an epoch comes back to all of them alike.
    """

    def __init__(self, reader: ShardReader, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._reader = reader
        self._room = cache_bytes
        self._kept: dict[Place, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def stack(
        self, places: Sequence[Place], new: Callable[[tuple[int, ...], DTypeLike], NDArray[Any]] = np.empty
    ) -> NDArray[np.uint8]:
        """Return several pictures as uint8 (N, H, W, 3).

        Args:
            places: N of them.
            new: makes the array, from its shape and dtype.

        Raises:
            UserError: the pictures differ in size.
        """
        pixels = [self.get(place) for place in places]
        if len(sizes := {picture.shape for picture in pixels}) > 1:
            raise UserError(
                f"pictures must have one size to be trained on, got {sorted(sizes)}: set pairs.resize=center_crop"
            )
        return np.stack(pixels, out=new((len(pixels), *pixels[0].shape), np.uint8))

    def get(self, place: Place) -> NDArray[np.uint8]:
        """Return one picture as uint8 (H, W, 3)."""
        if (picture := self._kept.get(place)) is not None:
            return picture
        picture = decode_image(image_of(self._reader.read(*place, IMAGE_EXTENSIONS)))
        with self._lock:
            if picture.nbytes <= self._room and place not in self._kept:
                self._kept[place] = picture
                self._room -= picture.nbytes
        return picture


# Of the artifact that the pairs stage writes and others read; raised when its bytes or their meaning change.
PAIRS_FORMAT = 3

IMAGE_EXTENSIONS = STORED


def decode_image(data: bytes) -> np.ndarray:
    """Decode a picture stored in a shard to uint8 (H, W, 3) RGB.

    Raises:
        ValueError: too many pixels; a few bytes can claim a picture of any size.
        Exception: whatever else Pillow raises for bytes that are no picture of a stored format.
    """
    with Image.open(io.BytesIO(data), formats=_STORED_FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
        return np.array(image.convert("RGB"))


def image_of(sample: Mapping[str, Any]) -> bytes:
    """Return the encoded picture of a pairs sample, in whichever format it is stored.

    Raises:
        UserError: the sample has no picture.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return cast(bytes, sample[extension])
    raise UserError(
        f"sample {sample.get('__key__')} has no picture ({', '.join(IMAGE_EXTENSIONS)}): has {sorted(sample)}"
    )


@dataclass(frozen=True)
class CaptionedPicture:
    """A sample's picture, uint8 (H, W, 3), and what asks for it."""

    caption: str
    image: NDArray[np.uint8]


def load_captioned_pictures(
    pairs: Artifact, places: Sequence[Place], caption_of: Callable[[Mapping[str, Any]], str]
) -> list[CaptionedPicture]:
    """Read the pictures of the samples at these places, with what `caption_of` makes of their facts."""
    with contextlib.closing(ShardReader(pairs.storage, pairs.files)) as reader:
        samples = [reader.read(*place) for place in places]
    return [
        CaptionedPicture(caption_of(decode_json(sample["json"])), decode_image(image_of(sample))) for sample in samples
    ]


def training_places(pairs: Artifact, count: int) -> list[Place]:
    """Return the places of `count` samples that are trained on, evenly spaced over the first shards that hold them."""
    held_out = set(held_out_places(pairs))
    places: list[Place] = []
    for shard, record in enumerate(pairs.shards()):
        if len(places) >= count:
            break
        places += [(shard, row) for row in range(record.rows) if (shard, row) not in held_out]
    count = min(count, len(places))
    return [places[position * len(places) // count] for position in range(count)]
