"""A model as a folder: what is saved is loaded, and damage is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm_core
from ldm_core import presets
from ldm_core.checkpoint import load, load_config, load_tokenizer, save
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.tokenizer import Tokenizer, build_vocabulary

CONFIG = presets.get("tiny-txt2img")


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    return CONFIG.build()


@pytest.fixture
def folder(model: LatentDiffusion, tmp_path: Path) -> Path:
    tokenizer = Tokenizer(build_vocabulary(["a red circle", "a blue square"], size=64))
    save(model, tmp_path / "model", tokenizer=tokenizer)
    return tmp_path / "model"


def test_a_saved_model_is_loaded_with_config_weights_and_vocabulary(model: LatentDiffusion, folder: Path) -> None:
    loaded = ldm_core.load(folder)
    assert loaded.config == model.config
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == frozen
    tokenizer = load_tokenizer(folder)
    assert "circle" in tokenizer.vocabulary
    assert CONFIG.conditioner is not None
    assert tokenizer.max_length == CONFIG.conditioner.max_length


def test_a_loaded_model_samples(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    loaded = load(folder)
    tokens = torch.from_numpy(tokenizer.encode(["a red circle", ""]).astype("int64"))
    images = loaded.sample(tokens[:1], unconditional=tokens[1:], seeds=[0], num_steps=2, guidance_scale=2.0)
    assert torch.isfinite(images).all()


def test_half_precision_and_channels_last_are_saved_as_plain_float32(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder).to(memory_format=torch.channels_last)
    save(loaded, tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    save(loaded.bfloat16(), tmp_path / "half")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / name).values()} == {torch.float32}


def test_weights_that_are_not_the_configs_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(name for name in weights if name.startswith("unet.") and weights[name].dim() == 4)
    weights["unet.stranger"] = weights.pop(names[0])
    weights[names[1]] = torch.zeros(1, 2, 3)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="must be those of its config") as error:
        load(folder)
    message = str(error.value)
    assert f"missing: {names[0]}" in message
    assert "unexpected: unet.stranger" in message
    assert f"misshapen: {names[1]} (1, 2, 3) instead of" in message
    assert "\n" not in message


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(folder)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model folder at .*absent"):
        load(tmp_path / "absent")
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks vocab\.txt"):
        load_tokenizer(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json"):
        load(folder)


def test_a_config_that_is_none_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text("{broken")
    with pytest.raises(ValueError, match="must be JSON"):
        load_config(folder)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_config(folder)
    path.write_text(json.dumps({**CONFIG.to_dict(), "learning_rate": 1}))
    with pytest.raises(ValueError, match="no setting 'learning_rate'"):
        load_config(folder)


def test_a_tokenizer_larger_than_the_text_transformer_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    vocabulary = build_vocabulary([f"word{i}" for i in range(3000)], size=2000)
    with pytest.raises(ValueError, match="the tokenizer's 2000 ids must fit the text transformer's 1024"):
        save(model, tmp_path, tokenizer=Tokenizer(vocabulary))
