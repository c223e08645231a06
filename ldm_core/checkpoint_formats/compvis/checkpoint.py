"""Import and export checkpoints of the paper's code release, .ckpt or .safetensors: whole models and first stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm_core import presets
from ldm_core.checkpoint import read_config, write_config
from ldm_core.checkpoint_formats.compvis.config import from_release, to_release
from ldm_core.checkpoint_formats.compvis.names import (
    CONDITIONER_PREFIX,
    FIRST_STAGE_PREFIX,
    UNET_PREFIX,
    first_stage_entries,
    model_entries,
)
from ldm_core.configs.conditioning import MaskedImageConfig
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import Config, LatentDiffusionConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import FirstStage, build_first_stage
from ldm_core.schedule import NoiseSchedule
from ldm_core.weights.name_mapping import Entry, their_shapes, to_ours, to_theirs
from ldm_core.weights.named_tensors import NamedTensors, differences, some

Weights = Literal["ema", "raw"]

EMA_PREFIX = "model_ema."
EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")
# Tables of the forward process, which ours computes from its configuration, see `schedule_buffers`.
SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
# Buffers of the loss and of training, which no network reads; the scale factor becomes part of the config.
OTHER_BUFFERS = ("scale_factor", "lvlb_weights", "logvar", "cond_ids")
POSITION_IDS = f"{CONDITIONER_PREFIX}transformer.text_model.embeddings.position_ids"


def import_checkpoint(
    tensors: NamedTensors, config: Config, *, weights: Weights | None = None
) -> tuple[Config, NamedTensors, bool]:
    """Give a checkpoint's weights our names.

    Args:
        tensors: the checkpoint's tensors, see `open_tensors`.
        config: the configuration that it was trained with.
        weights: "ema" for the averaged weights, which samples are drawn from, or "raw" for those in training; None
            takes the averaged ones if the checkpoint has them.

    Returns:
        The config, with the scale factor that the checkpoint's training measured; the weights, read one by one; and
        whether they are averaged.

    Raises:
        ValueError: names or shapes are not the config's (they are listed), the noise schedule is another one, or
            averaged weights are asked for and absent.
    """
    whole = holds_whole_model(tensors)
    if whole != isinstance(config, LatentDiffusionConfig):
        held, given = ("whole model", "first stage") if whole else ("first stage", "whole model")
        raise ValueError(f"{tensors.source} holds a {held}, the configuration is a {given}'s")
    model, listed = _on_meta(config)
    averaged = weights == "ema" or (weights is None and bool(_averages(tensors)))
    chosen = _choose(tensors, listed, averaged)
    if isinstance(config, LatentDiffusionConfig):
        if isinstance(config.conditioner, MaskedImageConfig):
            chosen = _without_second_first_stage(chosen)
        _check_schedule(config, tensors)
        config = _with_measured_scale(config, tensors)
    ours = to_ours(listed, NamedTensors.of_module(model).shapes, chosen, "the configuration")
    return config, ours, averaged


def infer_preset(tensors: NamedTensors) -> str:
    """Return the name of the preset whose names, shapes and noise schedule a checkpoint has.

    The number of attention heads leaves no trace in the weights, so a model that is not the published one may fit too.

    Raises:
        ValueError: no preset fits, or several different ones, which are listed.
    """
    candidates: Mapping[str, Config] = (
        presets.MODEL_CONFIGS if holds_whole_model(tensors) else presets.FIRST_STAGE_CONFIGS
    )
    fitting = {name: config for name, config in candidates.items() if _fits(config, tensors)}
    if not fitting:
        raise ValueError(
            f"no preset is {tensors.source}: give its configuration, or a preset to see in what it differs"
        )
    if len(set(fitting.values())) > 1:
        raise ValueError(f"{tensors.source} fits several presets: choose one of {', '.join(fitting)}")
    return next(iter(fitting))


def load_configuration(path: str | Path) -> Config:
    """Read the configuration of a checkpoint: a YAML file as the release has it, or a config.json of ours.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, or describes a model that we do not have; the setting is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    if path.suffix == ".json":
        return read_config(path)
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return from_release(values)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def holds_whole_model(tensors: NamedTensors) -> bool:
    """Return whether a checkpoint holds a whole diffusion model, not a first stage alone."""
    ema = _ema_name(UNET_PREFIX)
    return any(name.startswith((UNET_PREFIX, ema)) for name in tensors)


def export_state(model: LatentDiffusion | FirstStage) -> dict[str, Tensor]:
    """Return a model's weights and buffers under the release's names, without averaged weights beside them.

    Raises:
        ValueError: the release has no such conditioner.
    """
    if not isinstance(model, LatentDiffusion):
        return to_theirs(first_stage_entries(model), model.state_dict())
    state = to_theirs(model_entries(model), model.state_dict())
    if isinstance(model.config.conditioner, MaskedImageConfig):
        # Their conditioner is a second copy of the first stage.
        first_stage = [name for name in state if name.startswith(FIRST_STAGE_PREFIX)]
        state |= {CONDITIONER_PREFIX + name.removeprefix(FIRST_STAGE_PREFIX): state[name] for name in first_stage}
    return state | schedule_buffers(model.schedule) | {"scale_factor": torch.tensor(model.config.scale_factor)}


def export_folder(model: LatentDiffusion | FirstStage, folder: Path) -> str | None:
    """Write model.ckpt and config.yaml or, if the release cannot express the configuration, our config.json.

    Args:
        model: a whole model or a first stage, with weights in memory.
        folder: an existing folder.

    Returns:
        Why the release cannot run the model, or None where it can.

    Raises:
        ValueError: the release has no such conditioner, or a weight is not finite.
    """
    state = {name: _own(tensor) for name, tensor in export_state(model).items()}
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"weights must be finite numbers, the model's hold NaN or infinity in {some(broken)}")
    torch.save({"state_dict": state}, folder / "model.ckpt")
    try:
        values = to_release(model.config)
    except ValueError as error:
        write_config(model.config, folder)
        return str(error)
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return None


def schedule_buffers(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """Return the tables, (T,) float32, that theirs keeps with the weights (Ho et al. 2020, Eq. 4 and 7)."""
    alpha_bar = torch.tensor([schedule.alpha_bar(t) for t in range(schedule.timesteps)], dtype=torch.float64)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    betas = 1.0 - alpha_bar / previous
    variance = betas * (1.0 - previous) / (1.0 - alpha_bar)
    tables = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1.0 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1.0 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": (1.0 / alpha_bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1.0 / alpha_bar - 1.0).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1.0 - alpha_bar),
        "posterior_mean_coef2": (1.0 - previous) * (betas.neg() + 1.0).sqrt() / (1.0 - alpha_bar),
    }
    return {name: table.float() for name, table in tables.items()}


def _on_meta(config: Config) -> tuple[Any, list[Entry]]:
    if isinstance(config, FirstStageConfig):
        with torch.device("meta"):
            first_stage = build_first_stage(config)
        return first_stage, first_stage_entries(first_stage)
    model = config.build(device="meta")
    return model, model_entries(model)


def _ema_name(name: str) -> str:
    """Return the name of a weight's average: its name within `model`, without the dots."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def _averages(tensors: NamedTensors) -> list[str]:
    return [name for name in tensors if name.startswith(EMA_PREFIX) and name not in EMA_COUNTERS]


def _choose(tensors: NamedTensors, listed: list[Entry], use_averaged: bool) -> NamedTensors:
    """Select the tensors to read, raw or averaged, under the release's plain names."""
    if use_averaged and not _averages(tensors):
        raise ValueError(f"{tensors.source} has no averaged weights (model_ema.*): take the raw ones")
    averaged = {_ema_name(name): name for name in _averageable(listed)}
    replaced = set(averaged.values()) if use_averaged else set()

    def rename(name: str) -> str | None:
        if name.startswith(EMA_PREFIX):
            wanted = use_averaged and name not in EMA_COUNTERS and not name.startswith(f"{EMA_PREFIX}loss")
            return averaged.get(name, name) if wanted else None
        return None if name in replaced or _is_no_weight(name) else name

    return tensors.renamed(rename)


def _averageable(listed: list[Entry]) -> Iterator[str]:
    names = [name for entry in listed for name in entry.theirs]
    whole = any(name.startswith(UNET_PREFIX) for name in names)
    # In a whole model only the UNet is averaged, in a first stage alone everything.
    return (name for name in names if name.startswith(UNET_PREFIX) or not whole)


def _is_no_weight(name: str) -> bool:
    return (
        name in SCHEDULE_BUFFERS
        or name in OTHER_BUFFERS
        or name == POSITION_IDS
        or name.startswith(("loss.", f"{FIRST_STAGE_PREFIX}loss."))
    )


def _without_second_first_stage(tensors: NamedTensors) -> NamedTensors:
    """Drop the conditioner's copy of the first stage, after checking that it is one."""
    for name in [name for name in tensors if name.startswith(CONDITIONER_PREFIX)]:
        original = FIRST_STAGE_PREFIX + name.removeprefix(CONDITIONER_PREFIX)
        if original not in tensors or not torch.equal(tensors[name], tensors[original]):
            raise ValueError(f"{name} in {tensors.source} must be the first stage's own weight, it is another one")
    return tensors.renamed(lambda name: None if name.startswith(CONDITIONER_PREFIX) else name)


def _check_schedule(config: LatentDiffusionConfig, tensors: NamedTensors) -> None:
    expected = NoiseSchedule(config.schedule).betas
    if tensors.shapes.get("betas", tuple(expected.shape)) != tuple(expected.shape):
        raise ValueError(
            f"the schedule of {tensors.source} has {tensors.shapes['betas']} betas, the configuration's "
            f"{tuple(expected.shape)}"
        )
    if "betas" in tensors and not torch.allclose(tensors["betas"].float(), expected, rtol=1e-4, atol=0.0):
        first, last = tensors["betas"][0].item(), tensors["betas"][-1].item()
        raise ValueError(
            f"the noise schedule of {tensors.source} must be the configuration's, "
            f"got betas from {first:.6g} to {last:.6g} instead of {expected[0]:.6g} to {expected[-1]:.6g}"
        )


def _with_measured_scale(config: LatentDiffusionConfig, tensors: NamedTensors) -> LatentDiffusionConfig:
    """Take over the scale factor that was measured when training began, which the release keeps as a buffer."""
    if tensors.shapes.get("scale_factor") != ():
        return config
    measured = tensors["scale_factor"].float()
    # Compared in float32: a config's own digits stay where the buffer only rounds them.
    if torch.equal(measured, torch.tensor(config.scale_factor)):
        return config
    return dataclasses.replace(config, scale_factor=measured.item())


def _fits(config: Config, tensors: NamedTensors) -> bool:
    if isinstance(config, LatentDiffusionConfig):
        # Most presets are told apart by one shape, without building them.
        first = f"{UNET_PREFIX}input_blocks.0.0.weight"
        shape = tensors.shapes.get(_ema_name(first), tensors.shapes.get(first))
        if shape != (config.unet.model_channels, config.unet.in_channels, 3, 3):
            return False
    model, listed = _on_meta(config)
    chosen = _choose(tensors, listed, bool(_averages(tensors)))
    if isinstance(config, LatentDiffusionConfig):
        try:
            _check_schedule(config, tensors)
            if isinstance(config.conditioner, MaskedImageConfig):
                chosen = _without_second_first_stage(chosen)
        except ValueError:
            return False
    return not differences(their_shapes(listed, NamedTensors.of_module(model).shapes), chosen.shapes)


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor that fills its storage, because torch.save writes whole storages."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
