"""A default that keys leave out may change only together with its stage's format version.

Keys hold what differs from the defaults, so that a field added later keeps them. An artifact that was made under an old
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
from pydantic import Field

from pipelines.conditions.config import CONFIGS
from pipelines.config import REQUIRED, Config, defaults_of, runtime
from pipelines.run.plan import STAGES
from pipelines.run.recipe import Recipe

GOLDEN = Path(__file__).with_name("golden_defaults.json")
REWRITE = "python -m tests.jobs.test_golden_defaults"


def stage_defaults() -> dict[str, Any]:
    """Return the format version and all defaults that count, by stage, as they are read back from JSON."""
    found = {}
    for stage in STAGES:
        (section,) = configs_in(Recipe.model_fields[stage.name].annotation)
        known = dict(defaults(section))
        if stage.configure:
            known |= dict(condition_defaults(cached_only=stage.name == "latents"))
        found[stage.name] = {"format_version": stage.format_version, "defaults": known}
    values: dict[str, Any] = json.loads(json.dumps(found))
    return values


def condition_defaults(*, cached_only: bool) -> Iterator[tuple[str, Any]]:
    """Yield (`condition.text.dropout`, its default) for every setting of every kind of condition."""
    for kind, config in CONFIGS.items():
        for name, default in defaults(config):
            if not cached_only or name.partition(".")[0] in ("kind", *config.cached):
                yield f"condition.{kind}.{name}", default


def defaults(config: type, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (`training.steps`, its default) for every setting that can enter a key, those of inner sections too."""
    hints = typing.get_type_hints(config)
    for name, default in defaults_of(config).items():
        yield place + name, "required" if default is REQUIRED else default
        for inner in configs_in(hints[name]):
            yield from defaults(inner, f"{place}{name}.")


def configs_in(annotation: Any) -> list[type]:
    """Return the configuration classes in a type, at any depth: `dict[str, Rule] | None` has one."""
    if isinstance(annotation, type) and (issubclass(annotation, Config) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [found for inner in typing.get_args(annotation) for found in configs_in(inner)]


def lost(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what a key of the old defaults no longer says: a default that changed, or a field that is gone."""
    # As JSON, as keys are: 1, 1.0 and true are three values.
    return [
        f"{name}: {json.dumps(default)} -> {json.dumps(after[name]) if name in after else 'gone'}"
        for name, default in before.items()
        if name not in after or json.dumps(after[name]) != json.dumps(default)
    ]


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_a_default_changes_only_with_the_format_version(stage: str) -> None:
    golden, found = json.loads(GOLDEN.read_text())[stage], stage_defaults()[stage]
    changed = lost(golden["defaults"], found["defaults"])
    if changed and golden["format_version"] == found["format_version"]:
        pytest.fail(
            f"defaults of the stage {stage} changed, but not its format version ({found['format_version']}): what was "
            f"made under the old ones would be taken for what the new ones make. {'; '.join(changed)}\n"
            f"Raise the stage's FORMAT_VERSION, then rewrite the file: {REWRITE}",
            pytrace=False,
        )
    if json.dumps(golden, sort_keys=True) != json.dumps(found, sort_keys=True):
        pytest.fail(f"fields or the format of the stage {stage} are new: rewrite the file: {REWRITE}", pytrace=False)


class _Inner(Config):
    size: int = 1
    other: int | None = None


class _Outer(Config):
    needed: int
    inner: _Inner | None = None
    rules: dict[str, _Inner] = Field(default_factory=dict)
    threads: int = runtime(2)


def test_a_field_that_is_gone_counts_as_changed_even_if_its_default_was_none() -> None:
    before = dict(defaults(_Outer))
    assert sorted(before) == ["inner", "inner.other", "inner.size", "needed", "rules", "rules.other", "rules.size"]
    assert lost(before, {**before, "new": None}) == []
    assert lost(before, {name: value for name, value in before.items() if name != "inner.other"}) == [
        "inner.other: null -> gone"
    ]
    assert lost(before, {**before, "inner.size": 1.0}) == ["inner.size: 1 -> 1.0"]
    assert lost(before, {**before, "needed": 0}) == ['needed: "required" -> 0']


def test_every_section_and_what_is_in_it_is_watched() -> None:
    watched = {name: set(entry["defaults"]) for name, entry in stage_defaults().items()}
    assert {"quality", "columns.url", "filters.min", "scoring.batch_size"} <= watched["pairs"]
    assert not {"source", "scoring.clip", "download"} & watched["pairs"], "runtime fields enter no key"
    assert {"model.z_channels", "training.betas"} <= watched["autoencoder"]
    assert {"unet.dropout", "schedule.timesteps", "condition.text.transformer.width"} <= watched["diffusion"]
    assert "condition.text.tokenizer.size" in watched["latents"]
    assert "condition.text.transformer.width" not in watched["latents"], "latents stay cached when it changes"


def rewrite() -> None:
    """Write the defaults of today as the golden ones."""
    GOLDEN.write_text(json.dumps(stage_defaults(), indent=1) + "\n")


if __name__ == "__main__":
    rewrite()
