"""Folders of diffusers are read as they were written, older ones too; settings that we lack are refused by name."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm_core import checkpoint, presets
from ldm_core.checkpoint_formats.diffusers.folder import export_folder, import_folder
from ldm_core.checkpoint_formats.imported import Imported
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.tokenizers.clip import CLIP_END, CLIP_START, clip_tokenizer
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.tokenizers.wordpiece import build_vocabulary
from tests.random_weights import randomized

UNCONDITIONAL = dataclasses.replace(
    presets.get("tiny-uncond"),
    unet=dataclasses.replace(presets.get("tiny-uncond").unet, num_heads=None, num_head_channels=16),
    schedule=ScheduleConfig(kind="linear", timesteps=500, beta_start=1e-4, beta_end=0.02),
    parameterization="v",
    scale_factor=0.31,
)
CONFIGS = {
    "LDMTextToImagePipeline": presets.get("tiny-txt2img"),
    "StableDiffusionPipeline": presets.get("tiny-sd"),
    "LDMPipeline": UNCONDITIONAL,
}


def build(config: LatentDiffusionConfig) -> LatentDiffusion:
    return randomized(config.build(), std=0.05)


def tokenizer_of(kind: str) -> Tokenizer | None:
    if kind == "LDMTextToImagePipeline":
        return Tokenizer.from_vocabulary(build_vocabulary(["a red circle"], size=64))
    if kind == "StableDiffusionPipeline":
        letters = sorted({*"ared", *(f"{letter}</w>" for letter in "ared")})
        tokens = [*letters, "re", "red</w>", CLIP_START, CLIP_END]
        return clip_tokenizer({token: i for i, token in enumerate(tokens)}, ["r e", "re d</w>"])
    return None


def assert_same(found: Imported, model: nn.Module) -> None:
    state = model.state_dict()
    assert found.weights.shapes.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found.weights[name], tensor), name


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LatentDiffusion]:
    folder = tmp_path_factory.mktemp("diffusers")
    model = build(CONFIGS[request.param])
    assert export_folder(model, folder, tokenizer=tokenizer_of(request.param)) == request.param
    return folder, model


def test_a_pipeline_comes_back_with_the_same_bits_and_the_same_config(exported: tuple[Path, LatentDiffusion]) -> None:
    folder, model = exported
    found = import_folder(folder)
    assert found.config == model.config
    assert found.left_out == ()
    assert_same(found, model)
    before = tokenizer_of(found.kind)
    if before is not None:
        assert found.tokenizer is not None
        captions = ["a red red", "", "Rad dear!"]
        assert (found.tokenizer.encode(captions) == before.encode(captions)).all()


def test_an_imported_pipeline_is_a_model_that_loads(exported: tuple[Path, LatentDiffusion], tmp_path: Path) -> None:
    folder, model = exported
    found = import_folder(folder)
    checkpoint.write(found.config, found.weights, tmp_path / "ours", tokenizer=found.tokenizer, max_shard_gib=0.01)
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    loaded = checkpoint.load(tmp_path / "ours")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    if found.tokenizer is not None:
        again = checkpoint.load_tokenizer(tmp_path / "ours")
        assert (again.encode(["a red"]) == found.tokenizer.encode(["a red"])).all()


def test_shards_and_the_names_and_files_of_older_versions_are_read(
    exported: tuple[Path, LatentDiffusion], tmp_path: Path
) -> None:
    folder, model = exported
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(?<=attentions\.\d\.)(to_q|to_k|to_v|to_out\.0)")
    for path in folder.rglob("*"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors":
            if path.is_file():
                target.write_bytes(path.read_bytes())
            continue
        state = {pattern.sub(lambda match: old[match[1]], name): tensor for name, tensor in load_file(path).items()}
        if path.parent.name == "text_encoder":
            state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
            state["embeddings.position_ids"] = torch.arange(77)[None]
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(state, target.with_name(f"{stem}.bin"))
    assert_same(import_folder(tmp_path), model)
    export_folder(model, tmp_path / "sharded", tokenizer=tokenizer_of(import_folder(folder).kind), max_shard_gib=0.002)
    assert len(list((tmp_path / "sharded" / "unet").glob("*-of-*.safetensors"))) > 1
    assert_same(import_folder(tmp_path / "sharded"), model)


@pytest.mark.parametrize("name", ["tiny-kl-f8", "tiny-vq-f4"])
def test_a_first_stage_alone_comes_back(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(presets.first_stage(name), mid_attention=True, attention_resolutions=(64, 16))
    torch.manual_seed(0)
    first_stage = build_first_stage(config)
    assert export_folder(first_stage, tmp_path) == ("AutoencoderKL" if config.regularization == "kl" else "VQModel")
    found = import_folder(tmp_path)
    assert found.config == config
    assert_same(found, first_stage)


def test_settings_that_a_file_leaves_out_have_diffusers_defaults(exported: tuple[Path, LatentDiffusion]) -> None:
    folder, model = exported
    for path in folder.rglob("*config.json"):
        if path.parent.name not in ("unet", "vae", "vqvae"):
            continue
        whole = path.read_text()
        values = json.loads(whole)
        for name in ("act_fn", "norm_eps", "flip_sin_to_cos", "center_input_sample", "_class_name_"):
            values.pop(name, None)
        path.write_text(json.dumps(values | {"_diffusers_version": "0.2.2", "newest_option": None}))
        try:
            assert import_folder(folder).config == model.config
        finally:
            path.write_text(whole)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        ("LDMPipeline", "unet/config.json", {"act_fn": "gelu"}, r"unet\.act_fn must be 'silu' .*, got 'gelu'"),
        ("LDMPipeline", "unet/config.json", {"norm_eps": 1e-6}, r"unet\.norm_eps must be 1e-05"),
        ("LDMPipeline", "unet/config.json", {"freq_shift": 1}, r"unet\.freq_shift must be 0"),
        ("LDMPipeline", "unet/config.json", {"wavelets": 2}, r"unet\.wavelets has no counterpart here, got 2"),
        (
            "LDMPipeline",
            "unet/config.json",
            {"num_class_embeds": 10},
            r"unet\.num_class_embeds must be None .*, got 10",
        ),
        ("LDMPipeline", "unet/config.json", {"up_block_types": ["UpBlock2D"] * 2}, r"unet\.up_block_types must be"),
        ("LDMPipeline", "unet/config.json", {"block_out_channels": [64, 96]}, "must be multiples of the first"),
        ("LDMPipeline", "unet/config.json", {"block_out_channels": "64"}, "must be a positive integer, got '64'"),
        ("LDMPipeline", "unet/config.json", {"down_block_types": [1, 2]}, "must hold what diffusers writes"),
        ("LDMPipeline", "unet/config.json", {"_class_name": "UNet1DModel"}, "got 'UNet1DModel'"),
        ("LDMPipeline", "vqvae/config.json", {"norm_type": "spatial"}, r"first stage\.norm_type must be 'group'"),
        ("LDMPipeline", "vqvae/config.json", {"lookup_from_codebook": True}, "lookup_from_codebook must be False"),
        ("LDMPipeline", "vqvae/config.json", {"_class_name": "AutoencoderTiny"}, "got 'AutoencoderTiny'"),
        ("LDMPipeline", "scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "got 'sigmoid'"),
        ("LDMPipeline", "scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas must be None"),
        ("LDMPipeline", "scheduler/scheduler_config.json", {"prediction_type": "flow"}, "got 'flow'"),
        (
            "LDMPipeline",
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "its model_index.json says 'FluxPipeline'",
        ),
        (
            "StableDiffusionPipeline",
            "unet/config.json",
            {"use_linear_projection": True},
            "use_linear_projection must be",
        ),
        (
            "StableDiffusionPipeline",
            "unet/config.json",
            {"only_cross_attention": [True, False]},
            "only_cross_attention",
        ),
        (
            "StableDiffusionPipeline",
            "unet/config.json",
            {"attention_head_dim": [4, 3]},
            "heads of one number or one size",
        ),
        ("StableDiffusionPipeline", "unet/config.json", {"cross_attention_dim": 768}, "context_dim must be the cond"),
        ("StableDiffusionPipeline", "vae/config.json", {"use_quant_conv": False}, "use_quant_conv must be True"),
        ("StableDiffusionPipeline", "vae/config.json", {"shift_factor": 0.1}, "shift_factor must be None"),
        ("StableDiffusionPipeline", "text_encoder/config.json", {"hidden_act": "relu"}, "got 'relu'"),
        (
            "StableDiffusionPipeline",
            "text_encoder/config.json",
            {"layer_norm_eps": 1e-6},
            "layer_norm_eps must be 1e-05",
        ),
        ("StableDiffusionPipeline", "text_encoder/config.json", {"model_type": "t5"}, "got model_type='t5'"),
        ("LDMTextToImagePipeline", "bert/config.json", {"encoder_ffn_dim": 100}, r"bert\.encoder_ffn_dim must be 512"),
        ("LDMTextToImagePipeline", "bert/config.json", {"scale_embedding": True}, "scale_embedding must be False"),
        (
            "LDMTextToImagePipeline",
            "tokenizer/tokenizer_config.json",
            {"do_lower_case": False},
            "do_lower_case to false",
        ),
    ],
)
def test_settings_that_our_networks_lack_are_refused_by_name(
    folders: dict[str, Path], kind: str, file: str, change: dict[str, Any], message: str
) -> None:
    path = folders[kind] / file
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | change))
    try:
        with pytest.raises(ValueError, match=message) as error:
            import_folder(folders[kind])
        assert "\n" not in str(error.value)
    finally:
        path.write_text(whole)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export a folder of every kind of pipeline."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CONFIGS}
    for kind, folder in folders.items():
        export_folder(build(CONFIGS[kind]), folder, tokenizer=tokenizer_of(kind))
    return folders


def test_missing_and_unknown_parts_are_named(folders: dict[str, Path]) -> None:
    folder = folders["LDMPipeline"]
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    weights = load_file(path)
    weights["conv_out.stranger"] = weights.pop("conv_out.bias")
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"missing: unet\.conv_out\.bias; unexpected: unet\.conv_out\.stranger"):
        import_folder(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="unet lacks its weights: neither diffusion_pytorch_model"):
        import_folder(folder)
    path.write_bytes(whole)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.rename(scheduler.with_name("away"))
    with pytest.raises(FileNotFoundError, match=r"no file at .*scheduler_config\.json"):
        import_folder(folder)
    scheduler.with_name("away").rename(scheduler)


def test_components_that_do_not_belong_to_the_model_are_left_out_and_listed(folders: dict[str, Path]) -> None:
    folder = folders["StableDiffusionPipeline"]
    index = json.loads((folder / "model_index.json").read_text())
    safety = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (folder / "model_index.json").write_text(json.dumps(index | safety | {"_diffusers_version": "0.2.2"}))
    assert import_folder(folder).left_out == ("safety_checker",)


def test_models_without_a_pipeline_are_refused(tmp_path: Path) -> None:
    for name, message in (
        ("tiny-class", "no pipeline for a model conditioned by ClassConfig"),
        ("tiny-uncond", "set num_head_channels instead"),
        ("tiny-sd", "takes captions: give the tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            export_folder(presets.get(name).build("meta"), tmp_path)
    bert, clip = presets.get("tiny-txt2img").build("meta"), presets.get("tiny-sd").build("meta")
    with pytest.raises(ValueError, match="by BERT's tokenizer"):
        export_folder(bert, tmp_path, tokenizer=tokenizer_of("StableDiffusionPipeline"))
    with pytest.raises(ValueError, match="by CLIP's tokenizer"):
        export_folder(clip, tmp_path, tokenizer=tokenizer_of("LDMTextToImagePipeline"))
