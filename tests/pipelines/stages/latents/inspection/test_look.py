"""What `ldm inspect` shows of latents."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipelines.conditions.lengths import token_lengths
from pipelines.errors import UserError
from pipelines.inspection.inspect import inspect_path, view
from pipelines.shards.format import decode_npy, encode_npy, read_shard
from pipelines.stages.latents.inspection.look import SAMPLES_A_SHARD, SHARDS, look
from pipelines.store.ledger import Artifact
from tests.pipelines.stages.latents.in_this_process import make
from tests.pipelines.stages.latents.inspection import encoded
from tests.tiny_artifacts import first_stage_artifact, latents_artifact, pairs_artifact

INDEXES = ("index/000000.arrow", "index/000002.arrow")


@pytest.fixture
def latents(tmp_path: Path) -> Artifact:
    return latents_artifact(tmp_path, "0" * 64, rows=(8, 0, 8))


def test_every_value_of_the_samples_looked_at_is_in_its_channels_histogram(latents: Artifact) -> None:
    found = look(latents)
    means = np.stack(
        [
            decode_npy(sample["latent.npy"])[0]
            for record in latents.shards()
            for sample in read_shard(Path(latents.storage.path(record.name)))
        ]
    )
    assert found["samples"] == 16
    for channel, counts in enumerate(found["counts"]):
        assert sum(counts) == 16 * 4 * 4
        below = (means[:, channel].astype(float) < found["edges"][8]).sum()
        assert abs(int(below) - sum(counts[:8])) <= 1
    assert found["edges"][0] == pytest.approx(means.min(), abs=1e-3)
    assert found["edges"][-1] == pytest.approx(means.max(), abs=1e-3)


def test_of_many_shards_a_few_are_looked_into(tmp_path: Path) -> None:
    artifact = latents_artifact(tmp_path, "0" * 64, rows=(20,) * 11)
    assert look(artifact)["samples"] == SHARDS * SAMPLES_A_SHARD


def test_latents_without_samples_have_no_histogram(tmp_path: Path) -> None:
    artifact = latents_artifact(tmp_path, "0" * 64, rows=(0,))
    assert look(artifact)["samples"] == 0
    assert view(inspect_path(artifact.storage.url)) is not None


def test_people_see_channels_and_scripts_all_of_it(tmp_path: Path) -> None:
    artifact = make(tmp_path, "key", pairs_artifact(tmp_path), first_stage_artifact(tmp_path))
    facts = inspect_path(artifact.storage.url)
    assert facts["details"]["channels"].keys() == {"mean", "std", "min", "max"}
    assert facts["looked_at"]["samples"] == 9
    shown = io.StringIO()
    Console(file=shown, width=200).print(view(facts))
    text = shown.getvalue()
    assert "9 samples in 3 shards, latents of 4 × 4 × 4 in fp16" in text
    assert f"scale factor {artifact.details['scale_factor']:.5f}" in text
    assert f"{artifact.details['channels']['std'][3]:.4f}" in text
    assert "channel 3, 9 samples" in text
    assert "█" in text


def test_a_damaged_sample_is_one_line(latents: Artifact) -> None:
    shard = Path(latents.storage.path("000002.tar"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"000020003.latent.npy") + 700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"000002.tar is damaged \(000020003.latent.npy is not what its index says\)"):
        look(latents)


def test_tokens_are_counted_without_padding_and_bytes_add_up(tmp_path: Path) -> None:
    artifact = encoded.latents(tmp_path, encoded.pictures(tmp_path), first_stage_artifact(tmp_path))
    found = look(artifact)
    tokens = found["tokens"]["text"]
    # Two captions a sample, as long as its row and two more.
    assert (tokens["captions"], tokens["most"], tokens["mean"]) == (22, 7, 4.27)
    assert [tokens["counts"][tokens["edges"].index(length)] for length in range(8)] == [0, 0, 4, 4, 4, 4, 4, 2]
    parts = found["bytes_a_sample"]
    on_disk = [record.bytes for record in artifact.files if record.rows or record.name in INDEXES]
    assert sum(parts.values()) == pytest.approx(sum(on_disk) / 11, abs=0.5)
    assert parts["latent"] == 2 * 4 * 4 * 4 * 2 + 128
    text = io.StringIO()
    Console(file=text, width=200).print(view(inspect_path(artifact.storage.url)))
    assert "text: tokens of 22 captions, 4.3 in the mean" in " ".join(text.getvalue().split())
    assert "bytes a sample" in text.getvalue()


def test_of_frozen_encoders_the_states_that_are_stored_are_counted() -> None:
    lengths = {"text_lengths.npy": np.array([4, 9], np.uint16), "text2_lengths.npy": np.array([77, 77], np.uint16)}
    files = {name: encode_npy(array) for name, array in lengths.items()}
    assert token_lengths(files, {"condition": {"kind": "frozen_text"}}) == {"text": [4, 9], "text2": [77, 77]}
    assert token_lengths({}, {"condition": {"kind": "class"}}) == {}


def test_padding_inside_a_caption_counts_and_a_caption_of_padding_alone_has_no_token() -> None:
    tokens = np.array([[5, 0, 5, 0], [0, 0, 0, 0], [5, 5, 5, 5]], np.uint16)
    details = {"condition": {"kind": "text"}, "pad_id": 0}
    assert token_lengths({"tokens.npy": encode_npy(tokens)}, details) == {"text": [3, 0, 4]}
