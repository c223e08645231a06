"""Checkpoints of the paper's code release: every weight finds its place, and weights that do not fit are named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_core import checkpoint, presets
from ldm_core.checkpoint_formats.compvis import checkpoint as compvis
from ldm_core.checkpoint_formats.importing import open_checkpoint
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.weights.named_tensors import NamedTensors
from tests.random_weights import randomized

UNCONDITIONAL = presets.get("tiny-uncond")
FIRST_STAGE = dataclasses.replace(presets.first_stage("tiny-vq-f4"), mid_attention=True, attention_resolutions=(16,))
# Small, and yet all that the release can say: 8 heads of 64 in the text transformer, groups of 32.
TEXT = dataclasses.replace(
    UNCONDITIONAL,
    first_stage=dataclasses.replace(presets.first_stage("tiny-kl-f4"), mid_attention=True),
    unet=dataclasses.replace(UNCONDITIONAL.unet, context_dim=32, transformer_depth=2),
    conditioner=TextTransformerConfig(vocabulary_size=50, width=32, layers=2),
    scale_factor=0.7,
)
RESAMPLING = dataclasses.replace(
    UNCONDITIONAL,
    unet=dataclasses.replace(
        UNCONDITIONAL.unet, resblock_up_down=True, use_scale_shift_norm=True, num_heads=None, num_head_channels=32
    ),
    schedule=ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02),
    loss="l1",
)


def build(config: LatentDiffusionConfig) -> LatentDiffusion:
    return randomized(config.build(), std=0.05)


def save(state: dict[str, Tensor], path: Path, **beside: Any) -> Path:
    torch.save({"state_dict": state, **beside}, path)
    return path


def assert_same(found: NamedTensors, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert found.shapes.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_names_are_those_of_the_release() -> None:
    """The names are a sample from its checkpoints, one of every kind of layer."""
    names = compvis.export_state(build(TEXT)).keys()
    for name in (
        "model.diffusion_model.time_embed.2.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "model.diffusion_model.input_blocks.1.0.emb_layers.1.bias",
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.1.attn2.to_out.0.bias",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.norm3.bias",
        "model.diffusion_model.middle_block.2.out_layers.3.weight",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "model.diffusion_model.output_blocks.5.1.proj_out.bias",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.encoder.down.0.block.0.norm1.weight",
        "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight",
        "first_stage_model.encoder.down.1.downsample.conv.bias",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.decoder.mid.block_2.conv2.weight",
        "first_stage_model.decoder.up.2.upsample.conv.weight",
        "first_stage_model.decoder.up.0.block.1.conv1.weight",
        "first_stage_model.decoder.norm_out.bias",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.transformer.token_emb.weight",
        "cond_stage_model.transformer.pos_emb.emb.weight",
        "cond_stage_model.transformer.attn_layers.layers.2.1.to_q.weight",
        "cond_stage_model.transformer.attn_layers.layers.2.1.to_out.bias",
        "cond_stage_model.transformer.attn_layers.layers.3.0.weight",
        "cond_stage_model.transformer.attn_layers.layers.3.1.net.0.0.weight",
        "cond_stage_model.transformer.attn_layers.layers.3.1.net.2.bias",
        "cond_stage_model.transformer.norm.weight",
        "cond_stage_model.transformer.to_logits.bias",
        "posterior_mean_coef2",
        "scale_factor",
    ):
        assert name in names, name
    unconditional = compvis.export_state(build(RESAMPLING))
    assert unconditional["model.diffusion_model.input_blocks.3.0.in_layers.2.weight"].ndim == 4  # residual, downwards
    assert unconditional["model.diffusion_model.middle_block.1.qkv.weight"].shape[2:] == (1,)
    assert unconditional["model.diffusion_model.output_blocks.2.2.in_layers.0.weight"].ndim == 1  # residual, upwards
    assert "first_stage_model.quantize.embedding.weight" in unconditional
    classes = compvis.export_state(presets.get("tiny-class").build("meta"))
    assert classes["cond_stage_model.embedding.weight"].shape == (11, 64)
    semantic = compvis.export_state(presets.get("tiny-semantic").build("meta"))
    assert semantic["cond_stage_model.channel_mapper.weight"].shape == (3, 12, 1, 1)
    clip = compvis.export_state(presets.get("tiny-sd").build("meta"))
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.k_proj.bias" in clip
    assert "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight" in clip


@pytest.mark.parametrize("name", [name for name in presets.names() if not name.startswith("tiny")])
def test_every_published_model_has_a_place_for_every_weight(name: str) -> None:
    config = presets.get(name)
    model = config.build(device="meta")
    state = compvis.export_state(model)
    found, ours, averaged = compvis.import_checkpoint(NamedTensors.of_state(_without_tables(state)), config)
    assert found == config
    assert not averaged
    assert ours.shapes == NamedTensors.of_module(model).shapes
    duplicates = 2 if name == "inpainting-big" else 1
    first_stage = sum(parameter.numel() for parameter in model.first_stage.parameters())
    total = sum(tensor.numel() for key, tensor in state.items() if key not in compvis.SCHEDULE_BUFFERS) - 1
    assert total == sum(parameter.numel() for parameter in model.parameters()) + (duplicates - 1) * first_stage


def _without_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # On the meta device nothing can be compared: neither tables, nor a first stage with its copy.
    copies = {name for name in state if "first_stage_model." + name.removeprefix("cond_stage_model.") in state}
    return {name: tensor for name, tensor in state.items() if name not in copies | {"betas", "scale_factor"}}


@pytest.mark.parametrize(
    "config",
    [
        TEXT,
        RESAMPLING,
        dataclasses.replace(UNCONDITIONAL, first_stage=FIRST_STAGE),
        presets.get("tiny-class"),
        presets.get("tiny-layout"),
        presets.get("tiny-semantic"),
        presets.get("tiny-super-resolution"),
        presets.get("tiny-inpainting"),
        presets.get("tiny-sd"),
    ],
    ids=lambda config: type(config.conditioner).__name__,
)
def test_export_and_import_give_the_same_bits_and_the_same_config(
    tmp_path: Path, config: LatentDiffusionConfig
) -> None:
    model = build(config)
    reason = compvis.export_folder(model, tmp_path)
    assert (tmp_path / "config.yaml").is_file() == (reason is None)
    found = open_checkpoint(tmp_path)
    assert found.config == config
    assert_same(found.weights, model)
    # Nothing but plain tensors is in the file: torch's own careful reader takes it.
    state = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    again = compvis.export_state(model)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.items())


def test_the_same_names_in_safetensors_are_read(tmp_path: Path) -> None:
    model = build(UNCONDITIONAL)
    save_file(compvis.export_state(model), tmp_path / "model.safetensors.renamed")
    assert_same(open_checkpoint(tmp_path / "model.safetensors.renamed").weights, model)


def with_averages(state: dict[str, Tensor], prefix: str = "model.") -> dict[str, Tensor]:
    """Add averaged weights beside the raw ones as the release keeps them: other numbers, names without dots."""
    averaged = {
        "model_ema." + name.removeprefix(prefix).replace(".", ""): tensor + 1
        for name, tensor in state.items()
        if name.startswith("model." if prefix else "")
    }
    return state | averaged | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def test_averaged_weights_are_preferred_and_raw_ones_taken_on_request(tmp_path: Path) -> None:
    model = build(TEXT)
    path = save(with_averages(compvis.export_state(model)), tmp_path / "x.ckpt")
    tensors = open_checkpoint(path, config=_config_file(tmp_path, TEXT)).weights
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor + 1 if name.startswith("unet.") else tensor), name
    assert_same(open_checkpoint(path, config=_config_file(tmp_path, TEXT), weights="raw").weights, model)
    plain = save(compvis.export_state(model), tmp_path / "raw.ckpt")
    with pytest.raises(ValueError, match=r"has no averaged weights \(model_ema\.\*\): take the raw ones"):
        open_checkpoint(plain, config=_config_file(tmp_path, TEXT), weights="ema")


def _config_file(folder: Path, config: Any) -> Path:
    checkpoint.write_config(config, folder)
    return folder / "config.json"


def test_incomplete_averages_are_named(tmp_path: Path) -> None:
    state = with_averages(compvis.export_state(build(UNCONDITIONAL)))
    del state["model_ema.diffusion_modelout2weight"]
    state["model_ema.stranger"] = torch.ones(1)
    with pytest.raises(
        ValueError, match=r"missing: model\.diffusion_model\.out\.2\.weight; unexpected: model_ema\.str"
    ):
        open_checkpoint(save(state, tmp_path / "x.ckpt"), preset="tiny-uncond")


@pytest.mark.parametrize("name", ["tiny-kl-f4", "tiny-vq-f4"])
def test_a_first_stage_alone_becomes_what_a_recipe_takes(tmp_path: Path, name: str) -> None:
    from pipelines.stages.autoencoder.artifact import load_weights, weights_file

    torch.manual_seed(0)
    first_stage = build_first_stage(presets.first_stage(name))
    state = compvis.export_state(first_stage)
    assert "encoder.down.0.block.0.conv1.weight" in state
    losses = {"loss.logvar": torch.ones(()), "loss.discriminator.main.0.weight": torch.ones(4)}
    path = save(state | losses, tmp_path / "model.ckpt", callbacks={"best": 1.0})
    found = open_checkpoint(path)
    checkpoint.write(found.config, found.weights, tmp_path / "ours", max_shard_gib=1e-6)
    assert found.kind.startswith(name)
    assert found.config == first_stage.config
    loaded = load_weights(first_stage.config, weights_file(str(tmp_path / "ours")))
    assert_same(NamedTensors.of_module(loaded), first_stage)
    assert_same(NamedTensors.of_module(checkpoint.load_first_stage(tmp_path / "ours")), first_stage)
    averaged = open_checkpoint(save(with_averages(state, ""), tmp_path / "averaged.ckpt"))
    assert torch.equal(averaged.weights["quant_conv.bias"], first_stage.quant_conv.bias + 1)
    with pytest.raises(ValueError, match="holds a first stage, the configuration is a whole model's"):
        open_checkpoint(path, preset="tiny-uncond")


def test_the_measured_scale_factor_is_taken_over(tmp_path: Path) -> None:
    state = compvis.export_state(build(UNCONDITIONAL)) | {"scale_factor": torch.tensor(0.22765929)}
    found = open_checkpoint(save(state, tmp_path / "x.ckpt"), preset="tiny-uncond")
    assert isinstance(found.config, LatentDiffusionConfig)
    assert torch.tensor(found.config.scale_factor) == torch.tensor(0.22765929)
    assert dataclasses.replace(found.config, scale_factor=1.0) == UNCONDITIONAL


def test_schedule_tables_are_those_of_the_release() -> None:
    """Ho et al. 2020, Eq. 6 and 7, from betas alone, in double precision as the release computes them."""
    config = ScheduleConfig(beta_start=0.0015, beta_end=0.0195)
    tables = compvis.schedule_buffers(dataclasses.replace(UNCONDITIONAL, schedule=config).build("meta").schedule)
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    expected = {
        "betas": betas,
        "sqrt_recipm1_alphas_cumprod": torch.sqrt(1 / alpha_bar - 1),
        "posterior_variance": betas * (1 - previous) / (1 - alpha_bar),
        "posterior_mean_coef1": betas * torch.sqrt(previous) / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - previous) * torch.sqrt(1 - betas) / (1 - alpha_bar),
    }
    assert tuple(tables) == compvis.SCHEDULE_BUFFERS
    for name, table in expected.items():
        torch.testing.assert_close(tables[name], table.float(), rtol=1e-5, atol=1e-8)


def test_presets_are_told_apart_by_names_shapes_and_schedule(tmp_path: Path) -> None:
    for name in ("tiny-class", "tiny-inpainting", "tiny-sd", "tiny-uncond"):
        state = compvis.export_state(build(presets.get(name)))
        assert compvis.infer_preset(NamedTensors.of_state(state)) == name
    other = dict(state)
    other["betas"] = other["betas"] * 1.5
    with pytest.raises(ValueError, match="no preset is "):
        compvis.infer_preset(NamedTensors.of_state(other))
    with pytest.raises(ValueError, match=r"noise schedule .* must be the configuration's, got betas from 0\.00225"):
        open_checkpoint(save(other, tmp_path / "x.ckpt"), preset="tiny-uncond")
    # The two published sizes of semantic synthesis are one network.
    both = _without_tables(compvis.export_state(presets.get("semantic-landscapes-256").build("meta")))
    with pytest.raises(ValueError, match="choose one of semantic-landscapes-256, semantic-landscapes-512"):
        compvis.infer_preset(NamedTensors.of_state(both))
    faces = _without_tables(compvis.export_state(presets.get("uncond-ffhq-256").build("meta")))
    assert presets.get(compvis.infer_preset(NamedTensors.of_state(faces))) == presets.get("uncond-ffhq-256")


def test_weights_that_do_not_fit_are_named_in_a_list_of_limited_length(tmp_path: Path) -> None:
    state = compvis.export_state(build(UNCONDITIONAL))
    del state["model.diffusion_model.out.2.weight"]
    state["model.diffusion_model.out.3.weight"] = torch.ones(1)
    state["first_stage_model.quant_conv.bias"] = torch.ones(9)
    with pytest.raises(ValueError, match=r"must be those of the configuration, missing: ") as error:
        open_checkpoint(save(state, tmp_path / "x.ckpt"), preset="tiny-uncond")
    message = str(error.value)
    assert "missing: model.diffusion_model.out.2.weight; unexpected: model.diffusion_model.out.3.weight" in message
    assert "misshapen: first_stage_model.quant_conv.bias (9,) instead of (3,)" in message
    with pytest.raises(ValueError, match=r"and \d+ more; ") as error:
        open_checkpoint(tmp_path / "x.ckpt", preset="tiny-class")
    assert len(str(error.value)) < 5000


def test_weights_that_are_not_finite_or_not_exact_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    state = compvis.export_state(build(UNCONDITIONAL))
    state["model.diffusion_model.out.2.bias"][1] = float("nan")
    state["first_stage_model.quant_conv.bias"][0] = float("inf")
    path = save(state, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"NaN or infinity in first_stage\.quant_conv\.bias, unet\.conv_out\.bias"):
        import_to(path, tmp_path / "ours")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.ckpt"]
    whole = {name: tensor.double() for name, tensor in compvis.export_state(build(UNCONDITIONAL)).items()}
    with pytest.raises(ValueError, match="is float64: round it first"):
        import_to(save(whole, tmp_path / "x.ckpt"), tmp_path / "ours")


def import_to(path: Path, folder: Path) -> None:
    found = open_checkpoint(path, preset="tiny-uncond")
    with checkpoint.new_folder(folder) as partial:
        checkpoint.write(found.config, found.weights, partial)


def test_an_inpainting_conditioner_that_is_no_copy_of_the_first_stage_is_refused(tmp_path: Path) -> None:
    state = compvis.export_state(build(presets.get("tiny-inpainting")))
    name = "cond_stage_model.decoder.conv_out.bias"
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match=rf"{name} in .* must be the first stage's own weight"):
        open_checkpoint(save(state, tmp_path / "x.ckpt"), preset="tiny-inpainting")


def test_half_precision_is_widened_exactly(tmp_path: Path) -> None:
    model = build(UNCONDITIONAL).half()
    import_to(save(compvis.export_state(model), tmp_path / "x.ckpt"), tmp_path / "ours")
    loaded = checkpoint.load(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in model.state_dict().items())


def test_a_conditioner_that_the_release_lacks_is_refused() -> None:
    from ldm_core.checkpoint_formats.compvis.names import model_entries

    model = build(UNCONDITIONAL)
    model.conditioner = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the code release has no such conditioner: Identity"):
        model_entries(model)


def test_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="it holds none"):
        open_checkpoint(tmp_path)
    for name in ("a.ckpt", "b.ckpt"):
        save({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"hold one checkpoint of the code release, it holds a\.ckpt, b\.ckpt"):
        open_checkpoint(tmp_path)
    checkpoint.save(build(UNCONDITIONAL), tmp_path / "ours")
    with pytest.raises(ValueError, match="is a model folder of ours already"):
        open_checkpoint(tmp_path / "ours")
    with pytest.raises(ValueError, match="not both"):
        open_checkpoint(tmp_path / "a.ckpt", preset="tiny-uncond", config="x.yaml")


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    for content, message in (
        ({"optimizer": {}}, "must hold named tensors, or such under state_dict, it holds optimizer"),
        ([torch.ones(1)], "it holds list"),
        ({"state_dict": {"a": torch.ones(1), "b": "text"}}, "must be tensors, these are not: b"),
    ):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      rubbish")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        open_checkpoint(tmp_path / "x.safetensors")
