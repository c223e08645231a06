"""A model as a folder: what was saved is loaded again, and damage is named."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm_core
from ldm_core import presets
from ldm_core.checkpoint import (
    find_tokenizer,
    load,
    load_config,
    load_first_stage,
    load_tokenizer,
    new_folder,
    save,
    write,
)
from ldm_core.configs.text import FrozenTextConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.tokenizers.wordpiece import build_vocabulary
from ldm_core.weights.named_tensors import NamedTensors

CONFIG = presets.get("tiny-txt2img")


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    return CONFIG.build()


@pytest.fixture
def folder(model: LatentDiffusion, tmp_path: Path) -> Path:
    tokenizer = Tokenizer.from_vocabulary(build_vocabulary(["a red circle", "a blue square"], size=64))
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


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
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


def test_a_damaged_config_is_refused(folder: Path) -> None:
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
        save(model, tmp_path, tokenizer=Tokenizer.from_vocabulary(vocabulary))


def test_shards_are_read_as_one_model_and_damage_to_one_is_named(model: LatentDiffusion, folder: Path) -> None:
    save(model, folder, max_shard_gib=0.01)
    assert not (folder / "model.safetensors").exists()
    loaded = load(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    (shard,) = folder.glob("model-00002-of-*.safetensors")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load(folder)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    broken = CONFIG.build()
    with torch.no_grad():
        broken.unet.conv_out.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinity in unet\.conv_out\.bias"):
        save(broken, tmp_path / "model")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "model")


def test_weights_of_another_model_are_not_written(model: LatentDiffusion, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights of the model must be those of the config, missing: conditioner\."):
        write(CONFIG, NamedTensors.of_module(presets.get("tiny-uncond").build("meta")), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_of_another_kind_is_saved_as_its_own_file(folder: Path, tmp_path: Path) -> None:
    from ldm_core.tokenizers.clip import CLIP_END, CLIP_START, clip_tokenizer

    model = presets.get("tiny-sd").build()
    tokens = {token: i for i, token in enumerate(["a", "a</w>", CLIP_START, CLIP_END])}
    tokenizer = clip_tokenizer(tokens, [])
    save(model, tmp_path / "clip", tokenizer=tokenizer)
    assert sorted(path.name for path in (tmp_path / "clip").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (load_tokenizer(tmp_path / "clip").encode(["a aa"]) == tokenizer.encode(["a aa"])).all()
    assert find_tokenizer(folder) is not None
    save(model, tmp_path / "none")
    assert find_tokenizer(tmp_path / "none") is None


def test_an_encoder_of_the_transformers_library_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    """Its tables of positions are not in its state dict, and must have values after loading all the same."""
    pytest.importorskip("transformers")
    architecture = {"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
    architecture |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 16}
    text = FrozenTextConfig(architecture=architecture, width=32, max_length=16)
    config = dataclasses.replace(CONFIG, conditioner=text, unet=dataclasses.replace(CONFIG.unet, context_dim=32))
    model = config.build()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == config
    tokens = torch.tensor([[1, 2, 3, 0]])
    assert model.conditioner is not None
    assert loaded.conditioner is not None
    assert torch.equal(loaded.conditioner(tokens).context, model.eval().conditioner(tokens).context)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_a_first_stage_alone_is_told_from_a_whole_model(folder: Path, tmp_path: Path) -> None:
    first_stage = build_first_stage(CONFIG.first_stage)
    write(CONFIG.first_stage, NamedTensors.of_module(first_stage), tmp_path / "first_stage")
    loaded = load_first_stage(tmp_path / "first_stage")
    assert loaded.config == CONFIG.first_stage
    assert not loaded.training
    with pytest.raises(ValueError, match=r"holds a first stage alone: give it as autoencoder\.weights"):
        load(tmp_path / "first_stage")
    with pytest.raises(ValueError, match="holds a whole model: use `load`"):
        load_first_stage(folder)
    (tmp_path / "first_stage" / "config.json").write_text('{"regularization": "kl", "depth": 3}')
    with pytest.raises(ValueError, match=r"first stage config has no setting 'depth'"):
        load_first_stage(tmp_path / "first_stage")


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "a" / "new") as partial:
            (partial / "file").write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "a" / "new").mkdir()
    with new_folder(tmp_path / "a" / "new") as partial:
        (partial / "file").write_text("whole")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert (tmp_path / "a" / "new" / "file").read_text() == "whole"
    for taken in (tmp_path / "a" / "new", tmp_path / "a" / "new" / "file"):
        with pytest.raises(FileExistsError, match="nothing is overwritten"), new_folder(taken):
            pass
