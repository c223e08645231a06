"""Reading the latent cache: posterior moments and conditions by (shard, row). Torch is not imported.

moments: (2, C, h, w) mean and log-variance of a KL first stage, (1, C, h, w) latent of a VQ one, float16
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipelines.errors import UserError
from pipelines.shards.buckets import buckets_of
from pipelines.shards.format import decode_json, decode_npy, npy_header_bytes, parse_npy_header
from pipelines.shards.mixture import Part
from pipelines.shards.order import Place
from pipelines.shards.reader import ShardReader, joined
from pipelines.stages.latents.encoding.names import latent_file
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.store.ledger import Artifact

# Raised when the bytes that the stage writes, or their meaning, change. Its writer and its readers go by this number.
FORMAT_VERSION = 4

Condition = tuple[NDArray[Any], ...]


def _nothing(files: Mapping[str, bytes]) -> Condition:
    return ()


def shown_shapes(details: Mapping[str, Any], times: str = " × ") -> str:
    """Return the shapes (C, h, w) of the latents of an artifact for people, from its details."""
    shapes = details.get("latent_shapes", [details.get("latent_shape", [])])
    return ", ".join(times.join(map(str, shape)) for shape in shapes)


class Latents:
    """The samples of one or several latents artifacts.

    Args:
        artifact: a finished artifact of the `latents` stage.
        files: extensions of the condition's files to read.
        decode: decodes these files.
        mixed: other such artifacts; their shards are numbered after those of the first.

    Attributes:
        views: how many there are of each picture in each shard, (shards,) uint8.
        buckets: the bucket of each shard, if there are any; they are not mixed.
        held_out: the places of the first artifact that nothing is trained on, by ascending hash.

    Raises:
        UserError: the artifact is another stage's, or of another format version.
    """

    def __init__(
        self,
        artifact: Artifact,
        files: tuple[str, ...] = (),
        decode: Callable[[Mapping[str, bytes]], Condition] = _nothing,
        mixed: Sequence[Artifact] = (),
    ) -> None:
        self._artifacts = (artifact, *mixed)
        self._readers = [
            ShardReader(each.storage, each.require("latents", FORMAT_VERSION).files) for each in self._artifacts
        ]
        self.reader = joined(self._readers)
        self._files, self._decode = files, decode
        views = [each.details.get("views", 1) for each in self._artifacts]
        self.views = np.repeat(np.array(views, np.uint8), [len(each.rows_per_shard) for each in self._readers])
        # All shards have one, or none has: hundreds of thousands of names need not be looked at.
        names = self._readers[0].names
        self.buckets = buckets_of(names()) if buckets_of(islice(names(), 1)) else []
        self.held_out = held_out_places(artifact)

    def parts(self, weights: Sequence[int]) -> list[Part]:
        """Return the samples of each artifact to train on, with its weight; without those that it holds out."""
        return [
            Part(reader.rows_per_shard, held_out_places(artifact), weight)
            for artifact, reader, weight in zip(self._artifacts, self._readers, weights, strict=True)
        ]

    def get(self, shard: int, row: int, view: int = 0) -> tuple[NDArray[np.float16], Condition]:
        """Return the moments of one view of a sample, and what `decode` makes of the files of its condition."""
        latent = latent_file(view)
        return decode_npy(self.reader.read(shard, row, (latent,))[latent]), self.condition(shard, row)

    def condition(self, shard: int, row: int) -> Condition:
        """Return what `decode` makes of the files of a sample's condition."""
        return self._decode(self.reader.read(shard, row, self._files)) if self._files else ()

    def moments(
        self,
        places: Sequence[Place],
        views: Sequence[int],
        new: Callable[[tuple[int, ...], DTypeLike], NDArray[Any]],
    ) -> NDArray[np.float16]:
        """Read the moments of several samples into one array, (B, 2 or 1, C, h, w).

        Args:
            places: B of them.
            views: which view of each.
            new: makes the array, from its shape and dtype.

        Raises:
            UserError: a shard is damaged, or the samples are of different shapes.
        """
        files = list(map(latent_file, views))
        first = self.reader.read(*places[0], files[:1])[files[0]]
        head = first[: npy_header_bytes(first)]
        shape, dtype, order = parse_npy_header(head)
        array = new((len(places), *shape), dtype)
        # Files of one header hold arrays of one shape: it is compared, not parsed, and their values are read in place.
        found, values = bytearray(len(head)), array.data.cast("B")
        size = len(values) // len(places)
        for number, ((shard, row), file) in enumerate(zip(places, files, strict=True)):
            read = self.reader.read_into(shard, row, file, found, values[number * size : (number + 1) * size])
            if not read or found != head:
                other = decode_npy(self.reader.read(shard, row, (file,))[file])
                if other.shape != shape or other.dtype != dtype:
                    raise UserError(
                        f"latents of one batch must have one shape, but {self.reader.key(*places[0])} has {shape} and "
                        f"{self.reader.key(shard, row)} {other.shape}: set pairs.resize=center_crop"
                    )
                array[number] = other
            elif order == "F":
                array[number] = array[number].ravel().reshape(shape, order="F")
        return array

    def facts(self) -> Iterator[Mapping[str, Any]]:
        """Yield the facts of all samples: of the held-out ones, then of the others in the order of the shards."""
        every = ((shard, row) for shard, rows in enumerate(self.reader.rows_per_shard) for row in range(rows))
        held_out = set(self.held_out)
        for place in chain(self.held_out, (place for place in every if place not in held_out)):
            yield decode_json(self.reader.facts(*place))
