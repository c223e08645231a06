"""The index of a shard: made as it is written, and all that its reader believes only after it was checked."""

import os
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.errors import UserError
from pipelines.shards import reader as reader_module
from pipelines.shards.format import ShardWriter
from pipelines.shards.index import IndexBuilder, ShardIndex, Span, index_name, scan_shard
from pipelines.shards.reader import ShardReader, joined
from pipelines.shards.tar_headers import TarError
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileTable
from pipelines.store.storage import Storage

LONG = "k" * 150


def sample(shard: int, row: int) -> tuple[str, dict[str, bytes]]:
    files = {"latent.npy": bytes([shard, row]) * 300, "json": b"{}"}
    # A name that needs a pax header, and a file that only some samples have.
    key = f"{LONG}{row}" if row == 2 else f"{shard:05d}{row:04d}"
    return key, files | ({"txt": f"caption {row}".encode()} if row % 2 else {})


def write_shard(path: Path, shard: int, rows: int) -> ShardIndex:
    builder = IndexBuilder()
    with ShardWriter(path, builder) as tar:
        for row in range(rows):
            tar.add(*sample(shard, row))
    return builder.index()


def write(storage: Storage, rows: tuple[int, ...], facts: bytes = b"") -> FileTable:
    writer = ArtifactWriter("latents", "key", storage)
    for shard, count in enumerate(rows):
        name = f"{shard:06d}.tar"
        with storage.writer(name) as path:
            index = write_shard(path, shard, count)
        if facts:
            index = index.with_facts([facts % row for row in range(count)])
        writer.commit(name, rows=count)
        storage.write_bytes(index_name(name), index.encode())
        writer.commit(index_name(name))
    return writer.committed()


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "shards"))
    return Storage(f"memory://{request.node.name.replace('[', '-').strip(']')}")


def test_the_index_says_where_every_file_lies_and_what_its_checksum_is(tmp_path: Path) -> None:
    index = write_shard(tmp_path / "a.tar", 0, 5)
    data = (tmp_path / "a.tar").read_bytes()
    assert index.keys == [sample(0, row)[0] for row in range(5)]
    for row in range(5):
        _, files = sample(0, row)
        spans = index.spans(row)
        assert {name: data[span.offset : span.offset + span.size] for name, span in spans.items()} == files
        assert {name: span.crc32 for name, span in spans.items()} == {n: zlib.crc32(d) for n, d in files.items()}
    assert index.spans(0, ["txt"]) == {}
    assert index.spans(1, ["txt", "none"]).keys() == {"txt"}


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_an_index_made_from_the_tar_is_the_one_that_was_written_with_it(tmp_path: Path, rows: int) -> None:
    index = write_shard(tmp_path / "a.tar", 0, rows)
    encoded = index.encode()
    with open(tmp_path / "a.tar", "rb") as file:
        assert scan_shard(file, checksums=True).encode() == encoded
    decoded = ShardIndex.decode(encoded, shard_bytes=(tmp_path / "a.tar").stat().st_size)
    assert decoded.encode() == encoded
    assert (decoded.keys, len(decoded)) == (index.keys, rows)
    assert [decoded.spans(row) for row in range(rows)] == [index.spans(row) for row in range(rows)]
    assert list(decoded.differences(index)) == []


def test_the_json_of_samples_is_read_from_the_index_where_it_is_asked_for(tmp_path: Path) -> None:
    facts = [b'{"row": %d}' % row for row in range(5)]
    plain = write_shard(tmp_path / "a.tar", 0, 5)
    encoded = plain.with_facts(facts).encode()
    with_facts = ShardIndex.decode(encoded, shard_bytes=1 << 20, facts=True)
    assert [with_facts.facts(row) for row in range(5)] == facts
    assert with_facts.encode() == encoded
    without = ShardIndex.decode(encoded, shard_bytes=1 << 20)
    assert not without.has_facts
    assert without.encode() == plain.encode()


def test_an_index_in_memory_keeps_nothing_of_the_json_it_was_read_with() -> None:
    # A gigabyte, if the columns lay in the bytes of the files.
    index = IndexBuilder()
    index.add("0", {"latent.npy": Span(0, 1, 0)})
    encoded = index.index().with_facts([bytes(1 << 20)]).encode()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    kept = [ShardIndex.decode(bytes(bytearray(encoded)), shard_bytes=1) for _ in range(20)]
    python, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert python + pa.total_allocated_bytes() - before < 1 << 20
    assert kept[0].nbytes < 1000


def test_the_json_of_a_sample_is_read_without_its_shard(storage: Storage) -> None:
    reader = ShardReader(storage, write(storage, (3, 0, 2), facts=b'{"row": %d}'))
    storage.remove("000002.tar")
    assert [reader.facts(2, row) for row in (1, 0)] == [b'{"row": 1}', b'{"row": 0}']
    storage.remove("index/000000.arrow")
    with pytest.raises(UserError, match=r"000000\.tar (has lost its index|cannot be read by its index)"):
        reader.facts(0, 0)
    reader.close()


def test_an_index_without_the_json_of_its_samples_is_named(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with pytest.raises(UserError, match=r"000000\.tar has no index with the json of its samples"):
        ShardReader(storage, write(storage, (3,))).facts(0, 0)


def test_what_two_indexes_say_otherwise_is_named(tmp_path: Path) -> None:
    index = write_shard(tmp_path / "a.tar", 0, 3)
    assert list(index.differences(write_shard(tmp_path / "b.tar", 0, 2))) == ["3 samples, but its index has 2"]
    found = list(index.differences(write_shard(tmp_path / "b.tar", 1, 3)))
    assert found[0] == "sample 000000000 in the place of 000010000"
    assert found[-1] == f"{LONG}2.latent.npy is not what its index says"


def test_an_index_without_checksums_is_not_kept(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", 0, 2)
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(ValueError, match="without checksums"):
        scan_shard(file, checksums=False).encode()


def built(*samples: tuple[str, dict[str, Span]]) -> bytes:
    builder = IndexBuilder()
    for key, files in samples:
        builder.add(key, files)
    return builder.index().encode()


def damaged_keys() -> bytes:
    """An index whose column of keys says that they go on beyond its end."""
    encoded = built(("a" * 40, {}), ("b" * 37, {}))
    # Where each key begins and ends.
    places = struct.pack("<iii", 0, 40, 77)
    assert encoded.count(places) == 1
    return encoded.replace(places, struct.pack("<iii", 0, 40, 1 << 30))


def arrow(columns: dict[str, pa.Array]) -> bytes:
    sink, batch = pa.BufferOutputStream(), pa.record_batch(columns)
    with pa.ipc.new_file(sink, batch.schema) as file:
        file.write_batch(batch)
    return bytes(sink.getvalue())


HOSTILE = {
    "before the shard": (lambda: built(("a", {"b": Span(-2, 1, 0)})), "b outside of the shard's 1000 bytes"),
    "behind the shard": (lambda: built(("a", {"b": Span(512, 489, 0)})), "b outside of the shard's 1000 bytes"),
    "beyond all numbers": (lambda: built(("a", {"b": Span(2**63 - 1, 2**31 - 1, 0)})), "b outside of the shard's"),
    "negative size": (lambda: built(("a", {"b": Span(512, -1, 0)})), "b outside of the shard's 1000 bytes"),
    "one key twice": (lambda: built(("a", {}), ("a", {"b": Span(0, 1, 0)})), "two samples of one key"),
    "other columns": (lambda: arrow({"key": pa.array([b"a"]), "size": pa.array([1])}), "unexpected columns"),
    "missing values": (lambda: arrow({"key": pa.array([None], pa.binary())}), "missing values"),
    "keys beyond the end": (damaged_keys, "Length spanned by binary offsets"),
    "no Arrow": (lambda: b"ARROW1" * 100, "."),
    "nothing": (lambda: b"", "."),
}


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_index_is_refused(make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardIndex.decode(make(), shard_bytes=1000)


def test_an_index_that_was_cut_anywhere_is_refused(tmp_path: Path) -> None:
    encoded = write_shard(tmp_path / "a.tar", 0, 2).encode()
    for length in range(0, len(encoded), 97):
        with pytest.raises(ValueError, match=r"."):
            ShardIndex.decode(encoded[:length], shard_bytes=1 << 20)


def test_samples_of_more_bytes_than_memory_are_refused() -> None:
    files = {name: Span(0, 2**29 - 1, 0) for name in ("a", "b")}
    with pytest.raises(ValueError, match=f"a sample of more than {2**29} bytes"):
        ShardIndex.decode(built(("k", files)), shard_bytes=1 << 40)


def test_with_an_index_no_header_is_read(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(*_: object, **__: object) -> ShardIndex:
        raise TarError("scanned")

    monkeypatch.setattr(reader_module, "scan_shard", scan)
    reader = ShardReader(storage, write(storage, (3, 0, 4)))
    for shard, row in [(2, 3), (0, 0), (2, 0), (0, 2)]:
        key, files = sample(shard, row)
        assert (reader.key(shard, row), reader.read(shard, row)) == (key, files)
    assert reader.read(2, 1, ["txt"]) == {"txt": b"caption 1"}
    reader.close()


def test_a_flipped_byte_is_named_with_its_sample(tmp_path: Path) -> None:
    # Of a remote shard the digest is checked when it arrives: test_node_cache.py.
    storage = Storage(str(tmp_path))
    reader = ShardReader(storage, write(storage, (3, 3)))
    place = reader._index(1).spans(1)["latent.npy"].offset
    data = bytearray(storage.read_bytes("000001.tar"))
    data[place + 599] ^= 1
    storage.write_bytes("000001.tar", bytes(data))
    assert reader.read(1, 0) == sample(1, 0)[1]
    assert reader.read(1, 1, ["txt"]) == {"txt": b"caption 1"}
    with pytest.raises(
        UserError, match=r"000001.tar is damaged, .*latent.npy of sample 000010001 does not .*: `ldm verify"
    ):
        reader.read(1, 1)
    reader.close()


def test_two_shards_that_were_swapped_are_told_apart(storage: Storage) -> None:
    reader = ShardReader(storage, write(storage, (3, 3)))
    first, second = storage.read_bytes("000000.tar"), storage.read_bytes("000001.tar")
    assert len(first) == len(second)
    storage.write_bytes("000000.tar", second)
    storage.write_bytes("000001.tar", first)
    with pytest.raises(
        UserError, match=r"000000.tar (is damaged, or another shard stands in its place: latent.npy of|has the sha256)"
    ):
        reader.read(0, 0, ["latent.npy"])
    reader.close()


def test_a_shard_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    reader = ShardReader(storage, write(storage, (3,)))
    reader.read(0, 0)
    os.truncate(tmp_path / "000000.tar", 2000)
    with pytest.raises(UserError, match=r"000000.tar is damaged, .* of sample k+2 has 0 of \d+ bytes"):
        reader.read(0, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda storage, name: storage.remove(name), r"000001.tar .* index:? index/000001.arrow .*is missing"),
        (
            lambda storage, name: storage.write_bytes(name, storage.read_bytes("index/000000.arrow")),
            "000001.tar cannot be read by its index index/000001.arrow .it has the sha256 .*: `ldm verify",
        ),
        (
            lambda storage, name: storage.write_bytes(name, b"short"),
            "it has (the sha256 .* instead of|5 bytes, but .* were committed)",
        ),
    ],
    ids=["missing", "another shard's", "cut"],
)
def test_a_damaged_index_is_named(storage: Storage, damage: Callable[[Storage, str], None], message: str) -> None:
    reader = ShardReader(storage, write(storage, (3, 3)))
    damage(storage, "index/000001.arrow")
    reader.fetch_ahead([0, 1])
    with pytest.raises(UserError, match=message):
        reader.read(1, 0)
    assert reader.read(0, 0) == sample(0, 0)[1]
    reader.close()


def test_the_index_of_a_remote_shard_comes_with_it(cache: Path) -> None:
    storage = Storage("memory://index-ahead")
    reader = ShardReader(storage, write(storage, (3, 3)))
    reader.fetch_ahead([1])
    while len(list(cache.glob("*.file"))) < 2:
        time.sleep(0.01)
    storage.remove("index/000001.arrow")
    storage.remove("000001.tar")
    assert reader.read(1, 0) == sample(1, 0)[1]
    reader.close()


def test_an_index_of_another_number_of_samples_than_committed_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    shard, index = write(storage, (3,))
    files = FileTable.of([index, shard.model_copy(update={"rows": 4})])
    with pytest.raises(UserError, match="holds 3 samples, but 4 were committed"):
        ShardReader(storage, files).read(0, 0)


def test_indexes_are_bounded_in_number_and_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    reader = ShardReader(storage, write(storage, (4,) * 6))
    size = reader._index(0).nbytes
    assert size < 1000
    for bounds, kept in ((("MAX_INDEXES", 3), 3), (("MAX_INDEXES_BYTES", 2 * size), 2), (("MAX_INDEXES_BYTES", 1), 1)):
        monkeypatch.setattr(reader_module, *bounds)
        for shard in (0, 1, 2, 3, 4, 5, 4, 0):
            assert reader.read(shard, 1) == sample(shard, 1)[1]
        assert len(reader._indexes) == kept
        assert reader._indexes_bytes == sum(index.nbytes for index in reader._indexes.values())


def test_a_few_samples_of_remote_shards_are_read_without_fetching_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    storage = Storage("memory://in-ranges")
    reader = joined([ShardReader(storage, write(storage, (3, 3))), ShardReader(storage, write(storage, (3, 3)))])
    reader.read_in_ranges([1, 2])
    for shard, of in ((1, 1), (2, 0)):
        assert reader.read(shard, 1) == sample(of, 1)[1]
        head, values = bytearray(100), bytearray(500)
        assert reader.read_into(shard, 0, "latent.npy", head, memoryview(values))
        assert bytes(head + values) == sample(of, 0)[1]["latent.npy"]

    def fetched() -> list[int]:
        return [file.stat().st_size for file in tmp_path.rglob("*.file") if file.stat().st_size >= 5_000]

    assert not fetched(), "only indexes"
    reader.fetch_ahead([1])
    assert reader.read(1, 2) == sample(1, 2)[1]
    assert fetched()
    reader.close()
