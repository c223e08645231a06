"""Random access to samples, local and remote; damage is named, never read."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.shards.format import write_shard
from pipelines.shards.node_cache import cache_folder
from pipelines.shards.reader import JoinedReader, ShardReader, joined
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileTable
from pipelines.store.storage import Storage
from tests.tiny_artifacts import latents_artifact


def sample(shard: int, row: int) -> tuple[str, dict[str, bytes]]:
    return f"{shard:05d}{row:04d}", {"txt": f"caption {shard} {row}".encode(), "latent.npy": bytes([shard, row]) * 300}


def write(storage: Storage, rows: tuple[int, ...]) -> FileTable:
    writer = ArtifactWriter("latents", "key", storage)
    for shard, count in enumerate(rows):
        with storage.writer(f"{shard:06d}.tar") as path:
            write_shard(path, [sample(shard, row) for row in range(count)])
        writer.commit(f"{shard:06d}.tar", rows=count)
    return writer.committed()


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "shards"))
    return Storage(f"memory://{request.node.name.replace('[', '-').strip(']')}")


def test_any_sample_can_be_read_in_any_order(storage: Storage) -> None:
    reader = ShardReader(storage, write(storage, (3, 0, 4)))
    assert reader.rows_per_shard.tolist() == [3, 0, 4]
    assert [reader.key(2, row) for row in range(4)] == [f"00002{row:04d}" for row in range(4)]
    for shard, row in [(2, 3), (0, 0), (2, 0), (0, 2), (2, 3)]:
        assert reader.read(shard, row) == sample(shard, row)[1]
    assert reader.read(0, 1, ["txt"]) == {"txt": b"caption 0 1"}
    reader.close()


def test_more_shards_than_open_files_are_read_from_many_threads(storage: Storage) -> None:
    reader = ShardReader(storage, write(storage, (4,) * 6), max_open=2, cache_bytes=30_000)

    def read_all(start: int) -> int:
        places = [(shard, row) for shard in range(6) for row in range(4)]
        return sum(reader.read(*place) == sample(*place)[1] for place in places[start:] + places[:start])

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read_all, (0, 5, 10, 15))) == [24] * 4
    reader.close()


def test_fetched_shards_stay_within_their_bound_and_go_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    storage = Storage("memory://bounded")
    files = write(storage, (4,) * 8)
    size = files.at(0).bytes
    reader = ShardReader(storage, files, cache_bytes=2 * size)
    for shard in range(8):
        reader.fetch_ahead([shard])
        reader.read(shard, 0)
        kept = sum(file.stat().st_size for file in tmp_path.rglob("*.file"))
        assert size <= kept <= 2 * size
    reader.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, 1000), r"000001.tar has 1000 bytes, but \d+ were committed: `ldm verify"),
        (lambda path: path.unlink(), "000001.tar is missing: `ldm verify"),
        (lambda path: path.write_bytes(b"x" * path.stat().st_size), "000001.tar is not a whole tar"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: object, message: str) -> None:
    storage = Storage(str(tmp_path))
    reader = ShardReader(storage, write(storage, (3, 3)))
    assert callable(damage)
    damage(tmp_path / "000001.tar")
    with pytest.raises(UserError, match=message):
        reader.read(1, 0)
    assert reader.read(0, 0) == sample(0, 0)[1]


def test_a_damaged_remote_shard_is_named_before_it_is_fetched() -> None:
    storage = Storage("memory://damaged-shards")
    reader = ShardReader(storage, write(storage, (3, 3)))
    storage.remove("000000.tar")
    storage.write_bytes("000001.tar", b"short")
    with pytest.raises(UserError, match=r"000000\.tar is missing: `ldm verify"):
        reader.read(0, 0)
    with pytest.raises(UserError, match=r"000001.tar has 5 bytes, but \d+ were committed"):
        reader.read(1, 0)
    reader.close()


def test_another_number_of_samples_than_committed_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    (record,) = write(storage, (3,))
    with pytest.raises(UserError, match="holds 3 samples, but 4 were committed"):
        ShardReader(storage, FileTable.of([record.model_copy(update={"rows": 4})])).read(0, 0)


def test_readers_of_several_artifacts_are_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "disk"))
    artifacts = [
        latents_artifact(tmp_path, "0" * 64, rows=rows, name=f"latents-{number}")
        for number, rows in enumerate([(2, 0, 3), (4,), (1, 2)])
    ]
    alone = [ShardReader(each.storage, each.files) for each in artifacts]
    # One of them somewhere else.
    remote = Storage("memory://latents-to-be-mixed")
    for name in artifacts[1].storage.files_below():
        remote.write_bytes(name, artifacts[1].storage.read_bytes(name))
    storages = [artifacts[0].storage, remote, artifacts[2].storage]
    readers = [ShardReader(storage, each.files) for storage, each in zip(storages, artifacts, strict=True)]
    together = joined(readers)
    assert isinstance(together, JoinedReader)
    assert together.rows_per_shard.tolist() == [2, 0, 3, 4, 1, 2]
    together.fetch_ahead([5, 3, 0])
    places = [(number, shard) for number, reader in enumerate(alone) for shard in range(len(reader.rows_per_shard))]
    for shard, (number, its_shard) in enumerate(places):
        for row in range(int(together.rows_per_shard[shard])):
            assert together.read(shard, row) == alone[number].read(its_shard, row)
            assert together.key(shard, row) == alone[number].key(its_shard, row)
            assert set(together.read(shard, row, ("latent.npy",))) == {"latent.npy"}
    assert cache_folder().exists()
    together.close()
    assert not cache_folder().exists()
    assert joined(alone[:1]) is alone[0]
