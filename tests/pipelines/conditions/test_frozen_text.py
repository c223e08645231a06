"""Frozen text encoders: what is cached is what the encoder gives live, and what the UNet is fed of it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_core import presets
from ldm_core.conditioning import Conditioning
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.text import ClipTextConfig, FrozenTextConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.latent_diffusion import DiffusionNetwork
from ldm_core.pretrained import text_encoder
from pipelines.conditions.config import FrozenTextCondition, TextEncoderConfig
from pipelines.conditions.frozen_text import CaptionStateExamples, FrozenText, OpenedEncoder
from pipelines.errors import UserError
from pipelines.shards.format import decode_npy
from tests.pipelines.conditions.encoders import CAPTIONS, LENGTH, MINILM, UNET, cached, clip, live, prepared
from tests.random_weights import without_zeros


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenText, Any]:
    return prepared(tmp_path_factory.mktemp("latents"))


def test_a_cache_of_frozen_text_equals_the_encoder_run_live(minilm: tuple[FrozenText, Any]) -> None:
    for sample, captions in zip(cached(*minilm), CAPTIONS, strict=True):
        context, mask = live(captions)
        lengths = decode_npy(sample["text_lengths.npy"])
        states = decode_npy(sample["text.npy"])
        assert (states.dtype, lengths.dtype) == (np.float16, np.uint16)
        assert lengths.tolist() == mask.sum(1).tolist(), "real tokens alone are stored"
        torch.testing.assert_close(torch.from_numpy(states).float(), context[mask], rtol=2e-3, atol=2e-3)


def test_padding_is_what_follows_the_last_token_though_a_caption_may_name_the_token_for_it() -> None:
    encoder = OpenedEncoder(TextEncoderConfig(path=str(MINILM), max_length=LENGTH))
    named = "a [PAD] red circle"
    alone = encoder([named], "cpu")[0]
    beside_a_longer_one = encoder([named, "one two three four five six seven eight nine"], "cpu")[0]
    assert len(alone) == len(["[CLS]", "a", "red", "circle", "[SEP]"])
    np.testing.assert_allclose(alone, beside_a_longer_one, rtol=2e-3, atol=2e-3)


def test_a_node_with_another_encoder_at_the_same_place_is_refused(tmp_path: Path) -> None:
    kind, latents = prepared(tmp_path)
    about = latents.storage.read_json("text_encoder.json")
    latents.storage.write_json("text_encoder.json", {**about, "weights_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"is another .* than the one that this run began with .0000"):
        kind.encoder(latents.storage, "cpu", None)


def test_the_empty_caption_is_cached_once(minilm: tuple[FrozenText, Any]) -> None:
    context, mask = live([""])
    null = torch.from_numpy(decode_npy(minilm[1].storage.read_bytes("null_text.npy"))).float()
    torch.testing.assert_close(null, context[mask], rtol=2e-3, atol=2e-3)


def test_the_network_sees_in_training_what_the_whole_model_sees_when_it_is_sampled(
    minilm: tuple[FrozenText, Any],
) -> None:
    kind, latents = minilm
    conditioner = kind.conditioner(latents, UNetConfig(**UNET))
    model = without_zeros(
        LatentDiffusionConfig(
            first_stage=presets.first_stage("tiny-kl-f8"), unet=UNetConfig(**UNET), conditioner=conditioner
        ).build_network()
    )
    assert model.conditioner is None, "a frozen encoder is no part of what is trained"
    examples, random = kind.examples(latents), np.random.default_rng(0)
    drawn = [examples.draw(examples.decode(sample), random) for sample in cached(*minilm)[1:]]
    inputs = examples.inputs(examples.batch(drawn, torch.ones(1)))
    whole = DiffusionNetwork(model.unet, kind.frozen(latents, torch.device("cpu")))
    z, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
    tokens = kind.prompts(latents, None).inputs(CAPTIONS[1])  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(model(z, t, inputs), whole(z, t, tokens), rtol=5e-3, atol=5e-3)
        unmasked = model(z, t, Conditioning(context=inputs.context))
    assert (unmasked - whole(z, t, tokens)).abs().max() > 0.02, "padding would have been seen"


def test_every_caption_is_drawn_and_some_are_dropped(minilm: tuple[FrozenText, Any]) -> None:
    kind, latents = minilm
    null = decode_npy(latents.storage.read_bytes("null_text.npy"))
    examples = CaptionStateExamples(kind.files, null, LENGTH, masked=True, dropout=0.25)
    sample = examples.decode(cached(kind, latents)[0])
    random = np.random.default_rng(0)
    drawn = [examples.draw(sample, random) for _ in range(4000)]
    assert {len(states) for states in drawn} == set(sample[1].tolist())
    batch = examples.batch(drawn, torch.from_numpy(random.random(4000)))
    # No caption has as few tokens as the empty one, [CLS] and [SEP].
    assert len(null) == 2
    dropped = batch["mask"].sum(1) == 2
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(batch["context"][dropped][0, :2], torch.from_numpy(null))


def test_of_clip_padding_is_stored_too_because_published_models_are_fed_it(tmp_path: Path) -> None:
    kind, latents = prepared(tmp_path / "latents", {"path": str(clip(tmp_path / "clip"))})
    encoder = text_encoder(tmp_path / "clip")
    for sample, captions in zip(cached(kind, latents), CAPTIONS, strict=True):
        tokens = torch.from_numpy(encoder.tokenizer.encode(captions).astype(np.int64))
        context = encoder.conditioner(tokens).context
        assert context is not None
        assert decode_npy(sample["text_lengths.npy"]).tolist() == [77] * len(captions)
        stored = torch.from_numpy(decode_npy(sample["text.npy"])).float().view(-1, 77, 32)
        torch.testing.assert_close(stored, context, rtol=2e-3, atol=2e-3)
    examples = kind.examples(latents)
    drawn = [examples.decode(sample)[0][:77] for sample in cached(kind, latents)]
    assert examples.inputs(examples.batch(drawn, torch.ones(2))).mask is None
    assert kind.conditioner(latents, UNetConfig(**UNET)) == ClipTextConfig(
        vocabulary_size=49_408, width=32, layers=2, heads=4, feed_forward_width=64
    )


def test_another_encoder_than_the_cache_was_made_with_is_refused(
    minilm: tuple[FrozenText, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(MINILM, tmp_path / "other")
    weights = load_file(tmp_path / "other/model.safetensors")
    weights["embeddings.LayerNorm.weight"] += 1e-3
    save_file(weights, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    condition = {"kind": "frozen_text", "encoders": [{"path": str(tmp_path / "other"), "max_length": LENGTH}]}
    kind = FrozenText(FrozenTextCondition.model_validate(condition))
    with pytest.raises(UserError, match="latents 0123 were made with another text encoder") as caught:
        kind.frozen(minilm[1], torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_the_key_knows_an_encoder_by_its_files_and_not_by_their_place(tmp_path: Path) -> None:
    shutil.copytree(MINILM, tmp_path / "copy")
    of = [
        FrozenTextCondition.model_validate({"kind": "frozen_text", "encoders": [{"path": str(path)}]})
        for path in (MINILM, tmp_path / "copy")
    ]
    assert of[0].inputs() == of[1].inputs()
    assert of[0].cached_identity() == of[1].cached_identity()
    assert "text_encoder/0/model.safetensors" in of[0].inputs()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"path": "nowhere"}, "no nowhere: condition.encoders must name the folder of a text encoder"),
        ({"path": "nowhere", "open_clip": "ViT-H-14"}, "must name the weights file of an OpenCLIP"),
    ],
)
def test_an_encoder_that_is_not_there_is_said_in_the_plan(encoder: dict[str, Any], message: str) -> None:
    condition = FrozenTextCondition.model_validate({"kind": "frozen_text", "encoders": [encoder]})
    with pytest.raises(UserError) as caught:
        condition.inputs()
    assert message in str(caught.value)


def test_a_folder_that_is_no_encoder_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    with pytest.raises(UserError, match=r"condition\.encoders: .*encoder lacks weights") as caught:
        prepared(tmp_path / "latents", {"path": str(tmp_path / "encoder")})
    assert "\n" not in str(caught.value)


def test_masked_padding_needs_to_be_known() -> None:
    with pytest.raises(ValueError, match="mask_padding needs pad_id"):
        FrozenTextConfig(architecture={"model_type": "bert"}, width=8, max_length=4, pad_id=None, mask_padding=True)
