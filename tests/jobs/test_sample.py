"""`ldm sample` for models that are asked by class, and for one that is not asked at all."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_core import checkpoint, presets
from ldm_core.configs.conditioning import ClassConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.unet import UNetConfig
from pipelines.stages.diffusion.config import SamplerName
from tests.jobs.conftest import Ldm
from tests.random_weights import without_zeros
from tests.tiny import TINY_UNET

FAST = ("--steps", 2, "--device", "cpu", "--json")


def write_model(folder: Path, conditioner: ClassConfig | None, **changes: Any) -> Path:
    unet = UNetConfig(**TINY_UNET)
    if conditioner is None:
        unet = dataclasses.replace(unet, context_dim=None)
    config = LatentDiffusionConfig(
        first_stage=presets.first_stage("tiny-kl-f8"), unet=unet, conditioner=conditioner, **changes
    )
    torch.manual_seed(0)
    checkpoint.save(without_zeros(config.build()), folder)
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    labels = ClassConfig(classes=3, width=32, unconditional_class=True, names=("dress", "hat"))
    return write_model(tmp_path / "classes", labels)


def test_classes_are_asked_for_by_name(classes: Path, ldm: Ldm) -> None:
    code, out, err = ldm("sample", classes, "hat", "dress", "--images", 2, *FAST)
    assert code == 0, err
    assert [row["prompt"] for row in json.loads(out)["images"]] == ["hat", "hat", "dress", "dress"]


def test_the_precision_is_told_and_hardly_changes_the_pictures(classes: Path, tmp_path: Path, ldm: Ldm) -> None:
    pictures = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        code, told, err = ldm("sample", classes, "hat", "--precision", precision, "--out", out, *FAST)
        assert code == 0, err
        assert json.loads(told)["precision"] == precision
        pictures[precision] = np.asarray(Image.open(out / "000.png")).astype(int)
    difference = np.abs(pictures["fp32"] - pictures["bf16"])
    assert difference.max() > 0
    assert difference.mean() < 0.1 * pictures["fp32"].std()


def test_a_class_that_is_none_is_one_line(classes: Path, ldm: Ldm) -> None:
    code, _, err = ldm("sample", classes, "hats", *FAST)
    assert code == 1
    assert "prompts are names of classes, and 'hats' is none; did you mean 'hat'?" in err
    assert err.count("\n") == 1


def test_a_conditional_model_needs_prompts(classes: Path, ldm: Ldm) -> None:
    code, _, err = ldm("sample", classes, *FAST)
    assert code == 2
    assert "needs PROMPTS: what it is asked to show" in err


def test_a_model_without_a_null_class_cannot_be_guided(tmp_path: Path, ldm: Ldm) -> None:
    folder = write_model(tmp_path / "model", ClassConfig(classes=2, width=32))
    code, _, err = ldm("sample", folder, "1", *FAST)
    assert code == 1
    assert "cannot be guided: set the guidance scale to 1, got 5.0" in err
    code, _, err = ldm("sample", folder, "1", "--guidance", 1, *FAST)
    assert code == 0, err


def test_an_unconditional_model_takes_no_prompts(tmp_path: Path, ldm: Ldm) -> None:
    folder = write_model(tmp_path / "model", None)
    code, out, err = ldm("sample", folder, "--images", 3, *FAST)
    assert code == 0, err
    assert [row["seed"] for row in json.loads(out)["images"]] == [0, 1, 2]
    code, _, err = ldm("sample", folder, "a cat", *FAST)
    assert code == 1
    assert "this model is unconditional and takes no prompts, got 'a cat'" in err


def test_a_rectified_flow_is_sampled_by_every_sampler_but_without_eta(tmp_path: Path, ldm: Ldm) -> None:
    flow = ScheduleConfig(kind="rectified_flow")
    folder = write_model(tmp_path / "model", None, schedule=flow, parameterization="flow")
    for sampler in get_args(SamplerName):
        code, _, err = ldm("sample", folder, "--sampler", sampler, *FAST)
        assert code == 0, err
    code, _, err = ldm("sample", folder, "--eta", 0.5, *FAST)
    assert code == 2
    assert "is a rectified flow, which has no eta: leave it out, got --eta 0.5" in err
    for layout in ("diffusers", "compvis"):
        code, _, err = ldm("export", folder, tmp_path / layout, "--format", layout)
        assert code == 1
        assert "rectified_flow" in err
        assert not (tmp_path / layout).exists() or not any((tmp_path / layout).iterdir())
