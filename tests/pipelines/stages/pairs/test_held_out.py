"""The held-out split: a function of the set of contents alone, the same for every stage."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipelines.errors import UserError
from pipelines.shards.format import read_shard
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.autoencoder.learner import AutoencoderTask
from pipelines.stages.latents.artifact import Latents
from pipelines.stages.pairs import held_out
from pipelines.stages.pairs.artifact import training_places
from pipelines.stages.pairs.held_out import (
    MOST_COPIES,
    SHARE,
    HeldOutSample,
    SmallestContents,
    content_hash,
    held_out_places,
    held_out_samples,
)
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.pipelines.stages.pairs.conftest import RunPairs
from tests.pipelines.stages.pairs.web_server import picture
from tests.tiny_artifacts import encoded_latents_artifact, finish, first_stage_artifact, pairs_artifact


def table(contents: Sequence[str], **columns: Sequence[Any]) -> pa.Table:
    """Return a shard's table with these contents, all of them samples."""
    known: dict[str, Sequence[Any]] = {
        "key": [f"{row:09d}" for row in range(len(contents))],
        "status": ["ok"] * len(contents),
        "sha256": list(contents),
        "url": [None] * len(contents),
    }
    types = {"url": pa.string(), "sha256": pa.string()}
    return pa.table({name: pa.array(values, types.get(name)) for name, values in {**known, **columns}.items()})


def choose(shards: Sequence[Sequence[str]]) -> list[HeldOutSample]:
    contents = SmallestContents()
    for number, shard in enumerate(shards):
        contents.add(number, table(shard))
    return contents.choose(sum(map(len, shards)))


def contents_of(chosen: Sequence[HeldOutSample], shards: Sequence[Sequence[str]]) -> list[str]:
    return [shards[int(sample.shard.partition(".")[0])][sample.row] for sample in chosen]


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (63, 0), (64, 1), (127, 1), (128, 2), (650, 10)])
def test_one_sample_in_64_is_held_out_and_of_fewer_none(count: int, expected: int) -> None:
    shard = [str(number) for number in range(count)]
    chosen = choose([shard])
    assert len(chosen) == expected
    assert contents_of(chosen, [shard]) == sorted(shard, key=content_hash)[:expected]


def test_neither_the_order_of_samples_nor_the_size_of_shards_changes_what_is_held_out() -> None:
    contents = [str(number) for number in range(640)]
    expected = set(sorted(contents, key=content_hash)[:10])
    for size in (1, 7, 100, 640):
        random.Random(size).shuffle(contents)
        shards = [contents[start : start + size] for start in range(0, 640, size)]
        chosen = choose(shards)
        assert set(contents_of(chosen, shards)) == expected
        assert [sample.hash for sample in chosen] == sorted(sample.hash for sample in chosen)


def test_parts_that_forget_all_but_the_smallest_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [[f"{shard} {row}" for row in range(97)] for shard in range(30)]
    monkeypatch.setattr(held_out, "LIMIT", 40)
    whole, most = SmallestContents(), 0
    for first in range(0, 30, 12):
        part = SmallestContents()
        for number in range(first, min(first + 12, 30)):
            part.add(number, table(shards[number]))
        most = max(most, len(part.kept()))
        # As it comes from a task of Ray.
        whole.merge(HeldOutSample(*sample) for sample in json.loads(json.dumps(part.kept())))
    assert most == 40
    every = [content for shard in shards for content in shard]
    assert contents_of(whole.choose(len(every)), shards) == sorted(every, key=content_hash)[:40]


def test_samples_of_equal_content_are_held_out_together_or_not_at_all() -> None:
    contents = [str(number) for number in range(1280)]
    first, second, third = sorted(contents, key=content_hash)[:3]
    # 20 are to be held out of 1,280; the first content has too many samples for it, the others fit.
    copies = [first] * (MOST_COPIES + 1) + [second] * 5
    rest = [content for content in contents if content not in (first, second)][: 1280 - len(copies)]
    assert third in rest
    shards = [rest[:300] + copies[:11], rest[300:] + copies[11:]]
    held = contents_of(choose(shards), shards)
    assert 15 < len(held) <= 20
    assert (held.count(first), held.count(second), held.count(third)) == (0, 5, 1)


def test_a_set_of_one_picture_over_and_over_holds_none_out() -> None:
    assert choose([["the same"] * 6400]) == []


def test_what_has_no_digest_goes_by_its_url() -> None:
    contents = SmallestContents()
    urls = [f"http://a.example/{number}" for number in range(64)]
    contents.add(3, table([None] * 64, url=urls))  # type: ignore[list-item]
    (chosen,) = contents.choose(64)
    assert urls[chosen.row] == min(urls, key=content_hash)
    assert chosen.shard == "000003.tar"


def test_rows_are_counted_in_the_tar_of_their_bucket_and_without_what_failed() -> None:
    contents = SmallestContents()
    buckets = [None if row % 5 == 0 else "64x64" if row % 3 else "96x32" for row in range(200)]
    status = ["timeout" if bucket is None else "ok" for bucket in buckets]
    contents.add(7, table([str(row) for row in range(200)], status=status, bucket=buckets))
    rows = [row for row in range(200) if buckets[row]]
    tars = {name: [row for row in rows if buckets[row] == name] for name in ("64x64", "96x32")}
    chosen = contents.choose(SHARE * 100)
    assert len(chosen) == 100
    for sample in chosen:
        assert tars[sample.shard.split(".")[1]][sample.row] == int(sample.key)


def write_source(folder: Path, numbers: Sequence[int], parts: int) -> Path:
    """Write pictures, one of them damaged, and a table of them in as many parts."""
    folder.mkdir()
    size = -(-len(numbers) // parts)
    for part in range(parts):
        mine = numbers[part * size : (part + 1) * size]
        for number in mine:
            (folder / f"{number}.jpg").write_bytes(picture(number) if number else b"damaged")
        lines = [json.dumps({"file_name": f"{number}.jpg", "text": f"picture {number}"}) for number in mine]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    return folder / "*.jsonl"


def facts_of(details: dict[str, Any], storage: Storage) -> list[dict[str, Any]]:
    """Return the json of each held-out sample, where its place says that it is."""
    found = []
    for sample in held_out_samples(Artifact("pairs", "0" * 16, storage)):
        stored = list(read_shard(Path(storage.path(sample.shard))))[sample.row]
        assert stored["__key__"] == sample.key
        facts = json.loads(stored["json"])
        assert content_hash(facts["sha256"]) == sample.hash
        found.append(facts)
    assert len(found) == details["held_out_samples"] > 0
    return found


def test_neither_shards_nor_order_nor_files_nor_workers_change_which_pictures_are_held_out(
    run_pairs: RunPairs, tmp_path: Path
) -> None:
    numbers = list(range(130))
    first = write_source(tmp_path / "first", numbers, 1)
    random.Random(0).shuffle(numbers)
    other = write_source(tmp_path / "other", numbers, 3)
    results = []
    for name, options in {
        "a": {"source": str(first), "rows_per_shard": 64, "workers": 1},
        "b": {"source": str(other), "rows_per_shard": 9, "workers": 2},
        "c": {
            "source": str(other),
            "rows_per_shard": 50,
            "deduplicate": False,
            "resize": "buckets",
            "image_size": 64,
            "upscale": True,
        },
    }.items():
        details, storage = run_pairs(name, **options)
        assert details["held_out"] == "held_out/0.parquet"
        writer = ArtifactWriter("pairs", "0" * 16, storage)
        finish(writer, details)
        results.append({facts["sha256"] for facts in facts_of(details, storage)})
    assert len(results[0]) == 129 // SHARE
    assert results[0] == results[1] == results[2]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return pairs_artifact(tmp_path_factory.mktemp("pairs"), rows=(100, 0, 156))


def test_every_stage_leaves_out_the_same_samples(pairs: Artifact, tmp_path: Path) -> None:
    held = {sample.key for sample in held_out_samples(pairs)}
    assert len(held) == 4
    latents = Latents(encoded_latents_artifact(tmp_path, pairs, first_stage_artifact(tmp_path)))
    assert latents.held_out == held_out_places(pairs)
    assert {latents.reader.key(*place) for place in latents.held_out} == held
    training = {"steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    config = AutoencoderConfig.model_validate({"model": "tiny-kl-f8", "training": training})
    learner = AutoencoderTask(config=config, seed=0, pairs=pairs).build(torch.device("cpu"))
    # The samples divide among the partitions: an epoch of each ends with the same batch.
    reader, order = learner.batches.reader, learner.batches.order
    epoch = [reader.key(*order.sample(position).place) for position in range(order.samples_per_epoch)]
    rows = reader.rows_per_shard
    every = {reader.key(shard, row) for shard in (0, 2) for row in range(rows[shard])}
    assert len(epoch) == len(set(epoch))
    assert every - set(epoch) == held
    assert not set(training_places(pairs, 256)) & set(held_out_places(pairs))


def test_a_damaged_split_is_one_line(tmp_path: Path) -> None:
    pairs = pairs_artifact(tmp_path)
    pairs.storage.write_bytes("held_out/0.parquet", b"no parquet")
    with pytest.raises(
        UserError, match=r"held_out/0.parquet is not a table .* `ldm run RECIPE --force pairs`"
    ) as error:
        held_out_samples(pairs)
    assert "\n" not in str(error.value)
