"""What enters a key: settings that differ from their defaults, however a recipe writes them."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import Field, create_model

from ldm_core import presets
from pipelines.config import Config, runtime
from pipelines.run.recipe import parse_recipe
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.diffusion.config import DiffusionSettings, SamplingConfig
from pipelines.stages.pairs.config import PairsConfig
from pipelines.store.ledger import digest_json

TRAINING = {"steps": 10, "batch_size": 4, "learning_rate": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Shape:
    width: int
    depth: int = 2
    levels: list[int] = field(default_factory=lambda: [1, 2])


class Section(Config):
    size: int = 3
    ratio: float = 1
    shape: Shape = Shape(width=8)
    sampling: SamplingConfig = SamplingConfig(num_steps=25)
    rules: dict[str, SamplingConfig] = Field(default_factory=dict)
    path: str = runtime("here")


@pytest.mark.parametrize(
    ("settings", "identity"),
    [
        ({}, {}),
        ({"size": 3, "ratio": 1.0, "shape": {"width": 8, "depth": 2}, "path": "there"}, {}),
        ({"size": 4}, {"size": 4}),
        ({"shape": {"width": 8, "levels": [1]}}, {"shape": {"width": 8, "levels": [1]}}),
        ({"shape": {"width": 9}}, {"shape": {"width": 9}}),
        ({"sampling": {"num_steps": 25}}, {}),
        # The class's own default, where the section's is another.
        ({"sampling": {}}, {"sampling": {}}),
        ({"rules": {"a": {"eta": 1}, "b": {"eta": 0}}}, {"rules": {"a": {"eta": 1.0}, "b": {}}}),
    ],
)
def test_only_what_differs_from_the_defaults_is_part_of_the_identity(
    settings: dict[str, Any], identity: dict[str, Any]
) -> None:
    assert Section.model_validate(settings).identity() == identity


def test_settings_hold_defaults_too() -> None:
    assert Section().settings() == {
        "size": 3,
        "ratio": 1.0,
        "shape": {"width": 8, "depth": 2, "levels": [1, 2]},
        "sampling": SamplingConfig(num_steps=25).model_dump(),
        "rules": {},
    }


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (PairsConfig, {"source": "x", "quality": 80, "filters": {"size": {"min": 200}}}),
        (AutoencoderConfig, {"model": "kl-f8", "training": TRAINING}),
        (DiffusionSettings, {"unet": "txt2img-1p4b", "training": TRAINING}),
    ],
)
def test_a_field_added_later_keeps_the_key(section: type[Config], values: dict[str, Any]) -> None:
    later = create_model("Later", __base__=section, added=(bool, False), inner=(SamplingConfig, SamplingConfig()))
    assert later.model_validate(values).identity() == section.model_validate(values).identity()
    assert later.model_validate({**values, "added": True}).identity() == {
        **section.model_validate(values).identity(),
        "added": True,
    }


@pytest.mark.parametrize("name", sorted(presets.FIRST_STAGE_CONFIGS))
def test_a_first_stage_has_one_key_by_its_name_and_by_its_fields(name: str) -> None:
    spelled_out = json.loads(json.dumps(dataclasses.asdict(presets.first_stage(name))))
    forms = [name, {"preset": name}, spelled_out, {"preset": name, **spelled_out}]
    sections = [AutoencoderConfig.model_validate({"model": form, "training": TRAINING}) for form in forms]
    assert len({digest_json(section.identity()) for section in sections}) == 1


@pytest.mark.parametrize("name", sorted(presets.UNET_CONFIGS))
def test_a_unet_has_one_key_by_its_name_and_by_its_fields(name: str) -> None:
    spelled_out = json.loads(json.dumps(dataclasses.asdict(presets.unet(name))))
    forms = [name, {"preset": name}, spelled_out, {"preset": name, **spelled_out}]
    sections = [DiffusionSettings.model_validate({"unet": form, "training": TRAINING}) for form in forms]
    assert len({digest_json(section.identity()) for section in sections}) == 1


def test_a_number_has_one_key_however_it_is_written() -> None:
    values: dict[str, Any] = {"name": "r", "pairs": {"source": "x", "filters": {"size": {"min": 200}}}}
    whole = parse_recipe(values).pairs
    values["pairs"]["filters"]["size"]["min"] = 200.0
    assert digest_json(parse_recipe(values).pairs.identity()) == digest_json(whole.identity())
