"""Pictures whose latent is not finite in fp16: left out, counted, and no trouble to whoever reads the rest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm_core.tokenizers.tokenizer import Tokenizer
from pipelines.conditions.kinds import kind_of
from pipelines.datasets import open_latents
from pipelines.errors import UserError
from pipelines.shards.format import decode_npy, read_shard
from pipelines.shards.order import SampleOrder
from pipelines.stages.latents.artifact import Latents
from pipelines.stages.latents.encoding.encode import EncodeShard
from pipelines.stages.pairs.artifact import decode_image
from pipelines.stages.pairs.held_out import held_out_samples
from pipelines.store.ledger import Artifact, Ledger
from pipelines.store.storage import Storage
from tests.pipelines.stages.latents.in_this_process import CONFIG, make, reordered
from tests.tiny_artifacts import contents, first_stage_artifact, pairs_artifact

ALLOWED = CONFIG.model_copy(update={"max_unencodable_share": 0.1})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unencodable")


@pytest.fixture(scope="module")
def first_stage(root: Path) -> Artifact:
    return first_stage_artifact(root)


@pytest.fixture(scope="module")
def pairs(root: Path) -> Artifact:
    return pairs_artifact(root, rows=(70, 0, 60))


@pytest.fixture(scope="module")
def left_out(pairs: Artifact) -> set[str]:
    """Keys of the first and the fourth picture of each shard, and of the first held-out one."""
    return {"000000000", "000000003", "000020000", "000020003", held_out_samples(pairs)[0].key}


def pixels_digest(image: NDArray[np.uint8]) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.fixture(autouse=True)
def overflow(pairs: Artifact, left_out: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have these pictures encoded to infinity, whatever their key."""
    digests = set()
    for record in pairs.shards():
        for sample in read_shard(Path(pairs.storage.path(record.name))):
            if sample["__key__"] in left_out:
                digests.add(pixels_digest(decode_image(sample["png"])))
    original = EncodeShard._encode

    def encode(self: EncodeShard, pixels: Tensor) -> Tensor:
        moments = original(self, pixels).clone()
        for position, picture in enumerate(pixels.numpy()):
            if pixels_digest(picture) in digests:
                moments[position, 0, 1, 2, 2] = np.inf
        return moments

    monkeypatch.setattr(EncodeShard, "_encode", encode)


@pytest.fixture
def latents(root: Path, pairs: Artifact, first_stage: Artifact) -> Artifact:
    if (made := Ledger(Storage(str(root))).find("latents", "allowed")) is not None:
        return made
    return make(root, "allowed", pairs, first_stage, ALLOWED)


def test_they_are_counted_and_the_others_are_there(
    latents: Artifact, left_out: set[str], pairs: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(left_out) == 5
    assert (latents.details["unencodable"], latents.details["samples"]) == (5, 125)
    assert np.isfinite([latents.details["channels"][name] for name in ("mean", "std", "min", "max")]).all()
    keys = [sample["__key__"] for sample in open_latents(latents.storage.url)]
    every = [sample["__key__"] for r in pairs.shards() for sample in read_shard(Path(pairs.storage.path(r.name)))]
    assert keys == [key for key in every if key not in left_out]


def test_every_sample_is_read_as_its_own_and_held_out_ones_stay_held_out(
    latents: Artifact, left_out: set[str], pairs: Artifact
) -> None:
    kind = kind_of(CONFIG.condition)
    cache = Latents(latents, kind.files, kind.examples(latents).decode)
    assert cache.reader.rows_per_shard.tolist() == [
        rows - sum(key.startswith(shard) for key in left_out)
        for shard, rows in (("00000", 70), ("00001", 0), ("00002", 60))
    ]
    # Rows of the pairs' shards would be those of their neighbours.
    held_out = [sample.key for sample in held_out_samples(pairs)]
    assert [cache.reader.key(*place) for place in cache.held_out] == held_out[1:]
    order = SampleOrder(cache.reader.rows_per_shard, 0, 4, batch_size=1, partitions=1, excluded=cache.held_out)
    epoch = [cache.reader.key(*order.sample(position).place) for position in range(order.samples_per_epoch)]
    assert len(epoch) == len(set(epoch)) == 130 - 5 - len(held_out[1:])
    assert not set(epoch) & (left_out | set(held_out))
    tokenizer = Tokenizer.from_vocabulary_file(latents.storage.path("vocab.txt"), max_length=8)
    captions = {s["__key__"]: s for r in pairs.shards() for s in read_shard(Path(pairs.storage.path(r.name)))}
    for row in (0, 20, 56):
        sample = captions[cache.reader.key(2, row)]
        expected = tokenizer.encode([sample["txt"].decode()])[0]
        np.testing.assert_array_equal(cache.get(2, row)[1][0][0], expected)
    cache.reader.close()


def test_more_than_may_be_end_the_stage_on_one_line_and_are_left_out_once_they_may(
    root: Path, pairs: Artifact, first_stage: Artifact, latents: Artifact
) -> None:
    message = (
        r"^the first stage encodes sample \d{9} to values that are not finite in fp16, and [23] of 130 samples are "
        r"more than latents.max_unencodable_share=0.01 allows: train it again"
    )
    with pytest.raises(UserError, match=message):
        make(root, "too-many", pairs, first_stage)
    # All shards were encoded by then, or are now: the same artifact, whatever was allowed at first.
    goes_on = make(root, "too-many", pairs, first_stage, ALLOWED)
    assert contents(goes_on) == contents(latents)
    with pytest.raises(UserError, match=r"5 of 130 samples are more than latents.max_unencodable_share=0.03 allows"):
        make(root, "too-many", pairs, first_stage, CONFIG.model_copy(update={"max_unencodable_share": 0.03}))


def test_they_are_left_out_too_where_latents_are_taken_over(
    root: Path, pairs: Artifact, first_stage: Artifact, latents: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = reordered(root, pairs, "moved")
    anew = make(root, "moved-anew", moved, first_stage, ALLOWED)

    def refuse(*_: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(EncodeShard, "__call__", refuse)
    siblings = [(latents.storage, latents.files)]
    linked = make(root, "linked", pairs, first_stage, ALLOWED, lambda: iter(siblings))
    assert contents(linked) == contents(latents)
    taken = make(root, "moved-taken", moved, first_stage, ALLOWED, lambda: iter(siblings))
    assert contents(taken) == contents(anew)
    assert taken.details == anew.details
    for record in taken.shards():
        for sample in read_shard(Path(taken.storage.path(record.name))):
            assert np.isfinite(decode_npy(sample["latent.npy"])).all()


def test_a_first_stage_that_encodes_nothing_has_collapsed(
    root: Path, first_stage: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: EncodeShard, pixels: Tensor) -> Tensor:
        return torch.full((len(pixels), 2, 4, 4, 4), torch.nan, dtype=torch.half)

    monkeypatch.setattr(EncodeShard, "_encode", encode)
    few = pairs_artifact(root, rows=(3,), name="few")
    with pytest.raises(UserError, match="the first stage has collapsed: latents must vary to have a scale"):
        make(root, "nothing", few, first_stage, CONFIG.model_copy(update={"max_unencodable_share": 1.0}))
