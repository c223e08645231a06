"""`ldm_core.load` reads whatever holds a model, by its content; what it cannot tell is named."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from ldm_core import checkpoint, load, load_tokenizer, presets
from ldm_core.checkpoint_formats import compvis, diffusers
from ldm_core.checkpoint_formats.compvis.config import to_release
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.tokenizers.clip import CLIP_END, CLIP_START, clip_tokenizer
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.tokenizers.wordpiece import build_vocabulary
from tests.random_weights import randomized

UNCONDITIONAL = presets.get("tiny-uncond")


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return randomized(UNCONDITIONAL.build(), std=0.05)


@pytest.fixture(scope="module")
def text_model() -> LatentDiffusion:
    return randomized(presets.get("tiny-txt2img").build(), std=0.05)


def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocabulary(build_vocabulary(["a red circle"], size=64))


def assert_same(found: LatentDiffusion, expected: LatentDiffusion) -> None:
    assert not found.training
    assert found.config == expected.config
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name]), name
    frozen = {name for name, parameter in expected.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in found.named_parameters() if not parameter.requires_grad} == frozen


def release_state(model: LatentDiffusion) -> dict[str, dict[str, Tensor]]:
    return {"state_dict": compvis.export_state(model)}


def test_a_file_of_the_release_needs_no_name_and_no_other_file(text_model: LatentDiffusion, tmp_path: Path) -> None:
    torch.save(release_state(text_model), tmp_path / "weights.whatever")
    assert_same(load(tmp_path / "weights.whatever"), text_model)
    assert_same(load(tmp_path / "weights.whatever", preset="tiny-txt2img"), text_model)
    with pytest.raises(ValueError, match=r"weights\.whatever comes without a tokenizer: put its vocab\.txt or"):
        load_tokenizer(tmp_path / "weights.whatever")
    checkpoint.write_tokenizer(tokenizer(), tmp_path)
    beside = load_tokenizer(tmp_path / "weights.whatever")
    assert (beside.encode(["a red circle"])[0, :5] == tokenizer().encode(["a red circle"])[0, :5]).all()


@pytest.mark.parametrize("beside", ["model.yaml", "config.yaml"])
def test_the_configuration_beside_a_file_tells_what_its_weights_cannot(
    beside: str, model: LatentDiffusion, tmp_path: Path
) -> None:
    # As many weights of the same shapes, in other heads.
    unet = dataclasses.replace(UNCONDITIONAL.unet, num_heads=None, num_head_channels=16)
    other = dataclasses.replace(UNCONDITIONAL, unet=unet)
    torch.save(release_state(model), tmp_path / "model.ckpt")
    assert load(tmp_path / "model.ckpt").config == UNCONDITIONAL
    (tmp_path / beside).write_text(yaml.safe_dump(to_release(other)))
    assert load(tmp_path / "model.ckpt").config == other
    assert load(tmp_path / "model.ckpt", preset="tiny-uncond").config == UNCONDITIONAL
    assert load(tmp_path / "model.ckpt", config=tmp_path / beside).config == other


def test_folders_of_ours_and_of_diffusers_are_told_apart(text_model: LatentDiffusion, tmp_path: Path) -> None:
    checkpoint.save(text_model, tmp_path / "ours", tokenizer=tokenizer())
    diffusers.export_folder(text_model, tmp_path / "theirs", tokenizer=tokenizer())
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert_same(load(folder), text_model)
        assert (load_tokenizer(folder).encode(["a red"]) == tokenizer().encode(["a red"])[:, :77]).all()
        with pytest.raises(ValueError, match="says itself what it is: give no preset"):
            load(folder, preset="tiny-txt2img")


def test_a_vocabulary_beside_a_file_is_not_taken_for_clips(tmp_path: Path) -> None:
    torch.save(release_state(presets.get("tiny-sd").build()), tmp_path / "sd.ckpt")
    checkpoint.write_tokenizer(tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="comes without a tokenizer"):
        load_tokenizer(tmp_path / "sd.ckpt")
    tokens = [*sorted({*"ared", *(f"{letter}</w>" for letter in "ared")}), "re", "red</w>", CLIP_START, CLIP_END]
    clip = clip_tokenizer({token: i for i, token in enumerate(tokens)}, ["r e", "re d</w>"])
    checkpoint.write_tokenizer(clip, tmp_path)
    assert (load_tokenizer(tmp_path / "sd.ckpt").encode(["a red"]) == clip.encode(["a red"])).all()


@pytest.mark.parametrize("zipped", [True, False], ids=["today", "before PyTorch 1.6"])
def test_a_model_in_the_pages_of_its_file_trains_and_leaves_the_file_alone(
    zipped: bool, model: LatentDiffusion, tmp_path: Path
) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(release_state(model), path, _use_new_zipfile_serialization=zipped)
    digest = hashlib.sha256(path.read_bytes()).digest()
    loaded = load(path)
    assert all(tensor.data_ptr() % 4 == 0 for tensor in loaded.state_dict().values())
    network = loaded.network().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.randn(1, 3, 16, 16), torch.tensor([5])).square().mean().backward()
    optimizer.step()
    assert not torch.equal(loaded.unet.conv_in.weight, model.unet.conv_in.weight)
    assert hashlib.sha256(path.read_bytes()).digest() == digest
    assert_same(load(path), model)


def test_half_precision_is_widened_and_what_is_no_model_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in compvis.export_state(model).items() if name != "betas"}
    torch.save({"state_dict": halves}, tmp_path / "half.ckpt")
    widened = load(tmp_path / "half.ckpt", preset="tiny-uncond").unet.conv_in.weight
    assert torch.equal(widened, model.unet.conv_in.weight.half().float())
    first_stage = build_first_stage(presets.first_stage("tiny-kl-f8"))
    torch.save({"state_dict": compvis.export_state(first_stage)}, tmp_path / "kl.ckpt")
    with pytest.raises(ValueError, match="holds a first stage alone, no model"):
        load(tmp_path / "kl.ckpt", preset="tiny-kl-f8")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent"):
        load(tmp_path / "absent")
    torch.save({"state_dict": compvis.export_state(model) | {"model.diffusion_model.x": torch.ones(1)}}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"no preset is .*x: give its configuration"):
        load(tmp_path / "x")
