"""The pairs artifact as later stages read it: format version, pictures and captions."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import UserError
from pipelines.shards.format import read_shard
from pipelines.shards.reader import ShardReader
from pipelines.stages.pairs.pictures.formats import STORED
from pipelines.store.ledger import Artifact

CACHE_BYTES = 1 << 30

# The number of a shard, and of a sample in it.
Place = tuple[int, int]


def count_shards(pairs: Artifact) -> int:
    """Count the shards of a pairs artifact, which are numbered from 0 on."""
    # By their tables: with buckets a shard has several tars. Tables of something else lie in folders of their own.
    return sum("/" not in name for name in pairs.shards(".parquet").names)


def open_pairs(pairs: Artifact) -> ShardReader:
    """Open the shards of a pairs artifact.

    Raises:
        UserError: it is of another stage or another format, or holds no samples.
    """
    reader = ShardReader(pairs.storage, pairs.require("pairs", PAIRS_FORMAT).shards())
    if not sum(reader.rows_per_shard):
        raise UserError(f"{pairs.storage.url} holds no samples: see its parquet files for what became of each row")
    return reader


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

    def stack(self, places: Sequence[Place]) -> NDArray[np.uint8]:
        """Return several pictures as uint8 (N, H, W, 3).

        Raises:
            UserError: the pictures differ in size.
        """
        pixels = [self.get(place) for place in places]
        if len(sizes := {picture.shape for picture in pixels}) > 1:
            raise UserError(
                f"pictures must have one size to be trained on, got {sorted(sizes)}: set pairs.resize=center_crop"
            )
        return np.stack(pixels)

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
    """Decode a picture stored in a shard to uint8 (H, W, 3) RGB."""
    with Image.open(io.BytesIO(data)) as image:
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


def sample_captions(sample: Mapping[str, bytes | str]) -> list[str]:
    """Return every caption of a pairs sample, in order."""
    return [str(caption) for caption in json.loads(sample["json"])["captions"]]


@dataclass(frozen=True)
class TrainingPair:
    """A caption of the training set and its picture, uint8 (H, W, 3)."""

    caption: str
    image: NDArray[np.uint8]


def load_training_pairs(pairs: Artifact, count: int) -> list[TrainingPair]:
    """Read the first caption and the picture of `count` samples, evenly spaced over the first shards that hold them."""
    shards, available = [], 0
    for record in pairs.shards():
        if available >= count:
            break
        shards.append(record)
        available += record.rows
    count = min(count, available)
    wanted = {position * available // count for position in range(count)}
    chosen: list[TrainingPair] = []
    start = 0
    for record in shards:
        with pairs.storage.open(record.name) as file:
            for position, sample in enumerate(read_shard(file), start=start):
                if position in wanted:
                    chosen.append(TrainingPair(sample_captions(sample)[0], decode_image(image_of(sample))))
        start += record.rows
    return chosen
