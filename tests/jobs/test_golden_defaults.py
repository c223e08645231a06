"""A default of a recipe may change only together with its stage's format version.

Keys leave out what is as it is by default, so that a field added later keeps them. An artifact made under the old
default would therefore be taken for one made under the new. After an intended change raise the format version of the
stages named, and after any change rewrite the file:

    python -m tests.jobs.test_golden_defaults
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import Config, identity_of, is_runtime
from pipelines.run.plan import STAGES
from pipelines.run.recipe import Recipe

GOLDEN = Path(__file__).with_name("golden_defaults.json")
REWRITE = "python -m tests.jobs.test_golden_defaults"
REQUIRED = "required"


def defaults() -> dict[str, Any]:
    """Return the format version and all defaults that count, by stage."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        (section,) = _configs_in(Recipe.model_fields[stage.name].annotation)
        found[stage.name] = {"format_version": stage.format_version, "defaults": dict(sorted(_defaults_of(section)))}
    return found


def _defaults_of(config: type) -> Iterator[tuple[str, Any]]:
    for name, annotation, default in _fields_of(config):
        yield f"{config.__name__}.{name}", default
        for inner in _configs_in(annotation):
            yield from _defaults_of(inner)


def _fields_of(config: type) -> Iterator[tuple[str, Any, Any]]:
    if issubclass(config, Config):
        for name, field in config.model_fields.items():
            if not is_runtime(field):
                given = field.get_default(call_default_factory=True)
                yield name, field.annotation, REQUIRED if field.is_required() else identity_of(given)
        return
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        given = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        yield field.name, hints[field.name], REQUIRED if given is dataclasses.MISSING else identity_of(given)


def _configs_in(annotation: Any) -> list[type]:
    """Return the configuration classes in a type, at any depth: `dict[str, Rule] | None` has one."""
    if isinstance(annotation, type) and (issubclass(annotation, Config) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [found for inner in typing.get_args(annotation) for found in _configs_in(inner)]


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_a_default_changes_only_with_the_format_version(stage: str) -> None:
    golden, found = json.loads(GOLDEN.read_text())[stage], json.loads(json.dumps(defaults()))[stage]
    if golden == found:
        return
    before, after = golden["defaults"], found["defaults"]
    changed = [f"{name}: {before[name]} -> {after.get(name)}" for name in before if before[name] != after.get(name)]
    if changed and golden["format_version"] == found["format_version"]:
        pytest.fail(
            f"defaults of the stage {stage} changed, but not its format version ({found['format_version']}): what was "
            f"made under the old ones would be taken for what the new ones make. {'; '.join(changed)}\n"
            f"Raise the stage's FORMAT_VERSION, then rewrite the file: {REWRITE}",
            pytrace=False,
        )
    pytest.fail(f"fields of the stage {stage} are new, or its format is: rewrite the file: {REWRITE}", pytrace=False)


def test_every_section_and_what_is_in_it_is_watched() -> None:
    watched = {name: set(entry["defaults"]) for name, entry in defaults().items()}
    assert {"PairsConfig.quality", "Columns.url", "Rule.min", "Scoring.clip"} - watched["pairs"] == {"Scoring.clip"}
    assert {"FirstStageConfig.z_channels", "TrainingConfig.betas"} <= watched["autoencoder"]
    assert {"UNetConfig.dropout", "ScheduleConfig.timesteps", "TextConfig.width"} <= watched["diffusion"]


def rewrite() -> None:
    """Write the defaults of today as the golden ones."""
    GOLDEN.write_text(json.dumps(defaults(), indent=1) + "\n")


if __name__ == "__main__":
    rewrite()
