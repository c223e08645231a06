"""Cached latents held against their pictures and their first stage: what is wrong is named, what is gone is said."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_core import presets
from ldm_core.images import to_unit_range
from ldm_core.metrics import psnr
from ldm_core.networks.autoencoder import build_first_stage
from pipelines.inspection.verify import VerifyReport, verify_path
from pipelines.shards.format import ShardWriter, decode_npy, encode_npy, read_shard, read_with_facts
from pipelines.shards.index import IndexBuilder
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.latents.inspection import verify as samples
from pipelines.stages.pairs.artifact import decode_image
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.pipelines.conditions.encoders import MINILM
from tests.pipelines.stages.latents.inspection.encoded import Moments, latents, moments_of, pictures
from tests.tiny_artifacts import encoded_latents_artifact, first_stage_artifact, latents_config, pairs_artifact


@pytest.fixture
def pairs(tmp_path: Path) -> Artifact:
    return pictures(tmp_path)


@pytest.fixture
def first_stage(tmp_path: Path) -> Artifact:
    return first_stage_artifact(tmp_path)


def verified(artifact: Artifact, **options: Any) -> VerifyReport:
    (report,) = verify_path(artifact.storage.url, **options)
    return report


def test_latents_are_decoded_and_encoded_again(tmp_path: Path, pairs: Artifact, first_stage: Artifact) -> None:
    report = verified(latents(tmp_path, pairs, first_stage))
    assert report.ok
    assert report.samples["samples"] == 11
    assert report.samples["encoded_again"]["largest_difference"] < 2e-3, "fp16 rounds to eleven bits"
    network, found = load_first_stage(first_stage), []
    for record in pairs.shards():
        for sample in read_shard(Path(pairs.storage.path(record.name))):
            x = to_unit_range(torch.from_numpy(decode_image(sample["png"]))[None].permute(0, 3, 1, 2))
            decoded = network.decode(network.encode(x).mode()).clamp(-1, 1)
            found.append((round(float(psnr(x, decoded)), 2), sample["__key__"]))
    found.sort()
    decoded_db = report.samples["psnr_db"]
    assert (decoded_db["worst"], decoded_db["median"]) == pytest.approx((found[0][0], found[5][0]), abs=0.02)
    assert decoded_db["worst_key"] == found[0][1]
    (note,) = report.notes
    assert note.startswith("11 samples decoded and encoded again: PSNR ")
    assert decoded_db["worst_key"] in note


def shifted(shard: str, moments: Moments) -> Moments:
    return moments[1:] + moments[:1] if shard == "000002.tar" else moments


def one_of_another_picture(shard: str, moments: Moments) -> Moments:
    return [moments[1], *moments[1:]] if shard == "000002.tar" else moments


def of_another_shape(shard: str, moments: Moments) -> Moments:
    return [each[:, :, :2] for each in moments] if shard == "000002.tar" else moments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, "5 of 5 latents looked at are so: another encoder made them, or they are of other pictures"),
        (one_of_another_picture, "1 of 5 latents looked at are so"),
        (of_another_shape, "it has the shape (2, 4, 2, 4), and encoded again (2, 4, 4, 4)"),
    ],
)
def test_a_shard_with_latents_of_other_pictures_is_named(
    tmp_path: Path, pairs: Artifact, first_stage: Artifact, change: Any, message: str
) -> None:
    report = verified(latents(tmp_path, pairs, first_stage, change=change))
    (problem,) = report.problems
    assert problem.startswith("000002.tar: sample 000020000 is not what autoencoder autoencoder makes of its picture: ")
    assert message in problem


def test_a_shard_that_another_encoder_made_is_named(tmp_path: Path, pairs: Artifact, first_stage: Artifact) -> None:
    torch.manual_seed(1)
    other = build_first_stage(presets.first_stage("tiny-kl-f8")).eval()

    def by_the_other(shard: str, moments: Moments) -> Moments:
        return moments_of(pairs, shard, other) if shard == "000000.tar" else moments

    report = verified(latents(tmp_path, pairs, first_stage, change=by_the_other))
    (problem,) = report.problems
    assert problem.startswith("000000.tar: sample 000000000 is not what autoencoder autoencoder makes of its picture")
    assert "\n" not in problem


def test_latents_that_decode_worse_than_the_first_stage_itself_are_wrong_however_little_they_differ() -> None:
    moments = np.zeros((2, 4, 4, 4), np.float32)

    def wrong(cached_db: float, own_db: float) -> bool:
        return samples._is_wrong(samples._Compared("000000.tar", "a", moments, moments, cached_db, own_db), 0.0, 0.05)

    assert not wrong(22.5, 25)
    assert wrong(21.5, 25)
    assert not wrong(38, 70), "of a blank picture the last bits decide"
    assert wrong(float("nan"), 25)


def test_bf16_latents_are_held_to_less(tmp_path: Path, pairs: Artifact, first_stage: Artifact) -> None:
    def rounded(shard: str, moments: Moments) -> Moments:
        # More than a pass in bf16 loses, and far more than one in fp32: a tenth of the spread.
        noise = np.random.default_rng(0).standard_normal(moments[0].shape if moments else 0)
        return [(each + 0.1 * each.std() * noise).astype(np.float16) for each in moments]

    found = {
        precision: verified(
            latents(tmp_path, pairs, first_stage, change=rounded, name=precision, config={"precision": precision})
        )
        for precision in ("fp32", "bf16")
    }
    assert {precision: report.ok for precision, report in found.items()} == {"fp32": False, "bf16": True}
    assert found["bf16"].samples["encoded_again"]["tolerance"] == 0.2


def encoded(root: Path, change: Callable[[str, dict[str, bytes]], dict[str, bytes]], **settings: Any) -> Artifact:
    """Encode pairs as the stage does, and write the shard again with other files of some samples."""
    pairs, first_stage = pairs_artifact(root, rows=(3,)), first_stage_artifact(root)
    config = latents_config(batch_size=2, **settings)
    made = encoded_latents_artifact(root, pairs, first_stage, name="made", **settings)
    writer, index = ArtifactWriter("latents", "latents", Storage(str(root)) / "latents" / "latents"), IndexBuilder()
    facts = []
    for name in made.files.names:
        if not name.startswith(("000000", "index")):
            writer.storage.write_bytes(name, made.storage.read_bytes(name))
            writer.commit(name)
    with writer.storage.writer("000000.tar") as path, ShardWriter(path, index) as tar:
        for sample in read_with_facts(made.storage, "000000.tar"):
            key = sample.pop("__key__")
            facts.append(sample.pop("json"))
            tar.add(key, change(key, sample))
    writer.commit("000000.tar", rows=3)
    writer.storage.write_bytes("index/000000.arrow", index.index().with_facts(facts).encode())
    writer.commit("index/000000.arrow")
    writer.finish(
        format_version=FORMAT_VERSION,
        config=config.model_dump(mode="json"),
        identity={},
        upstream={"pairs": pairs.key, "autoencoder": first_stage.key},
        details={**made.details, "condition": {"kind": config.condition.kind}},
        seconds=0.0,
        code_version="test",
    )
    return Artifact("latents", "latents", writer.storage)


def as_they_are(key: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return files


@pytest.mark.usefixtures("own_threads")
def test_further_views_are_encoded_again_too(tmp_path: Path) -> None:
    settings = {"views": {"count": 3, "smallest_crop": 0.5}}
    report = verified(encoded(tmp_path / "right", as_they_are, **settings))
    assert (report.ok, report.samples["samples"], report.samples["latents"]) == (True, 3, 6)

    def mixed_up(key: str, files: dict[str, bytes]) -> dict[str, bytes]:
        return files | {"latent.2.npy": files["latent.npy"]} if key == "000000001" else files

    (problem,) = verified(encoded(tmp_path / "wrong", mixed_up, **settings)).problems
    assert problem.startswith(
        "000000.tar: sample 000000001, view 2, is not what autoencoder autoencoder makes of its pic"
    )
    assert "1 of 6 latents looked at are so" in problem

    def missing(key: str, files: dict[str, bytes]) -> dict[str, bytes]:
        return {name: data for name, data in files.items() if (key, name) != ("000000000", "latent.1.npy")}

    (problem,) = verified(encoded(tmp_path / "missing", missing, **settings)).problems
    assert problem == "000000.tar: sample 000000000 has no latent.1.npy"


@pytest.mark.usefixtures("own_threads")
def test_states_of_a_frozen_encoder_are_encoded_again_and_another_captions_are_named(tmp_path: Path) -> None:
    encoder = {"path": str(MINILM), "max_length": 16}
    settings = {"condition": {"kind": "frozen_text", "encoders": [encoder]}}
    right = encoded(tmp_path / "right", as_they_are, **settings)
    report = verified(right)
    assert report.ok
    again = report.samples["condition_encoded_again"]
    assert again["largest_difference"] < 0.01 < again["tolerance"]
    assert again["largest_file"] in report.notes[0]

    def of_another_caption(key: str, files: dict[str, bytes]) -> dict[str, bytes]:
        if key != "000000001":
            return files
        return files | {"text.npy": encode_npy(decode_npy(files["text.npy"])[::-1].copy())}

    (problem,) = verified(encoded(tmp_path / "wrong", of_another_caption, **settings)).problems
    assert problem.startswith(
        "000000.tar: text.npy of sample 000000001 is not what condition frozen_text makes of its pair"
    )
    manifest = right.storage.read_json("manifest.json")
    manifest["config"]["condition"]["encoders"][0]["path"] = str(tmp_path / "gone")
    right.storage.write_json("manifest.json", manifest)
    report = verified(right)
    assert report.ok
    assert "condition_encoded_again" not in report.samples
    assert any(note.startswith("what is cached of the condition is not compared: ") for note in report.notes)


@pytest.mark.usefixtures("own_threads")
def test_tokens_must_be_the_same(tmp_path: Path) -> None:
    def swapped(key: str, files: dict[str, bytes]) -> dict[str, bytes]:
        if key != "000000002":
            return files
        return files | {"tokens.npy": encode_npy(decode_npy(files["tokens.npy"])[::-1].copy())}

    (problem,) = verified(encoded(tmp_path, swapped)).problems
    assert "tokens.npy of sample 000000002 is not what condition text makes of its pair: it differs by inf" in problem


def test_latents_of_another_encoder_than_their_first_stage_are_named(
    tmp_path: Path, pairs: Artifact, first_stage: Artifact
) -> None:
    report = verified(latents(tmp_path, pairs, first_stage, details={"encoder_sha256": "0" * 64}))
    held = first_stage.details["encoder_sha256"][:12]
    assert report.problems == [f"latents: made by encoder 000000000000, but autoencoder autoencoder holds {held}"]


def test_without_its_pairs_latents_are_decoded_alone(tmp_path: Path, pairs: Artifact, first_stage: Artifact) -> None:
    artifact = latents(tmp_path, pairs, first_stage)
    shutil.rmtree(pairs.storage.path())
    report = verified(artifact)
    assert report.ok
    assert report.notes == [
        "11 samples decoded, but not compared with the pictures: pairs pairs is no more under this root"
    ]
    ruined = latents(tmp_path, pictures(tmp_path), first_stage, change=of_another_shape, name="ruined", upstream={})
    assert verified(ruined).notes == ["not compared with the pictures: no autoencoder is named in the manifest"]


def test_without_its_first_stage_the_files_of_latents_are_verified(
    tmp_path: Path, pairs: Artifact, first_stage: Artifact
) -> None:
    artifact = latents(tmp_path, pairs, first_stage)
    shutil.rmtree(first_stage.storage.path())
    report = verified(artifact)
    assert report.ok
    assert report.notes == ["not compared with the pictures: autoencoder autoencoder is no more under this root"]


def test_samples_that_the_pairs_do_not_have_are_named(tmp_path: Path, pairs: Artifact, first_stage: Artifact) -> None:
    artifact = latents(tmp_path, pairs, first_stage)
    shutil.rmtree(pairs.storage.path())
    pictures(tmp_path, rows=(6, 0, 2))
    assert verified(artifact).problems == ["000002.tar: sample 000020002 is not in that shard of pairs pairs"]


def test_a_damaged_shard_of_pairs_is_no_fault_of_the_latents(
    tmp_path: Path, pairs: Artifact, first_stage: Artifact
) -> None:
    artifact = latents(tmp_path, pairs, first_stage)
    Path(pairs.storage.path("000000.tar")).unlink()
    report = verified(artifact)
    assert report.ok
    assert report.samples["samples"] == 5
    assert report.notes[1].startswith("000000.tar: not compared with its pictures: ")


def test_as_many_samples_are_looked_at_as_are_asked_for(tmp_path: Path, pairs: Artifact, first_stage: Artifact) -> None:
    artifact = latents(tmp_path, pairs, first_stage)
    assert verified(artifact, samples=3).samples["samples"] == 3
    report = verified(artifact, samples=0)
    assert (report.ok, report.notes, report.samples) == (True, [], {})


def test_samples_of_damaged_latents_are_not_looked_at(tmp_path: Path, pairs: Artifact, first_stage: Artifact) -> None:
    artifact = latents(tmp_path, pairs, first_stage)
    Path(artifact.storage.path("index/000000.arrow")).unlink()
    report = verified(artifact)
    assert (report.ok, report.samples) == (False, {})


def test_samples_added_to_the_pairs_since_do_not_matter(tmp_path: Path, pairs: Artifact, first_stage: Artifact) -> None:
    artifact = latents(tmp_path, pairs, first_stage, upstream={"pairs": "pairs+1", "autoencoder": "autoencoder"})
    found = artifact.upstream("pairs")
    assert found is not None
    assert (found.key, found.storage) == ("pairs", Storage(str(tmp_path)) / "pairs/pairs")
    assert verified(artifact).samples["pairs"] == "pairs"
