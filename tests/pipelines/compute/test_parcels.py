"""Values between workers, without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipelines.compute.parcels import SMALLEST_ARRAY_BYTES, pack, pack_all, unpack


@dataclass
class Shard:
    name: str
    pictures: NDArray[np.uint8]
    small: NDArray[np.float32]
    files: list[dict[str, bytes]]


def shard() -> Shard:
    pictures = np.random.default_rng(0).integers(0, 256, (3, SMALLEST_ARRAY_BYTES), np.uint8)
    return Shard("000001.tar", pictures, np.ones(3, np.float32), [{"json": b"{}"}])


def test_a_value_arrives_as_it_was_and_its_large_arrays_are_views_of_the_parcel() -> None:
    sent = shard()
    parcel = pack(7, sent)
    arrived = unpack(parcel)
    assert (arrived.name, arrived.files) == (sent.name, sent.files)
    np.testing.assert_array_equal(arrived.pictures, sent.pictures)
    np.testing.assert_array_equal(arrived.small, sent.small)
    assert np.shares_memory(arrived.pictures, sent.pictures), "copied"
    assert not arrived.pictures.flags.writeable
    assert parcel.column("position").to_pylist() == [7]


def test_a_parcel_among_others_is_taken_out_alone() -> None:
    parcels = pa.concat_tables([pack(0, shard()), pack(1, shard())]).combine_chunks()
    np.testing.assert_array_equal(unpack(parcels.slice(1, 1)).pictures, shard().pictures)


@pytest.mark.parametrize("values", [[], [{"number": 1}, {"number": 2}]])
def test_items_are_packed_as_one_table_of_the_same_columns(values: list[dict[str, Any]]) -> None:
    parcels = pack_all(values)
    assert [unpack(parcels.slice(row, 1)) for row in range(len(parcels))] == values
    assert parcels.schema.equals(pack(0, {}).schema)
