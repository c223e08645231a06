"""The base of every typed configuration: unknown keys are refused; each field says whether it can change the output."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

# Stands for the default of a setting that has none.
REQUIRED = object()


class Config(BaseModel):
    """A section of a recipe: immutable, and unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """Return what an artifact's key is made of: the settings that differ from their defaults, as JSON values.

        A field that is added later, with what was done before as its default, therefore keeps every key. In return, a
        default that changes must raise the format version of its stage (tests/jobs/test_golden_defaults.py).
        """
        found: dict[str, Any] = identity_of(self)
        return found

    def settings(self) -> dict[str, Any]:
        """Return all fields that can change the output, defaults too, as JSON values."""
        values = self.model_dump(mode="json")
        return {
            name: (inner.settings() if isinstance(inner := getattr(self, name), Config) else values[name])
            for name, field in type(self).model_fields.items()
            if not is_runtime(field)
        }


def identity_of(value: Any) -> Any:
    """Return the JSON value that stands for a setting in a key; of configurations only what differs from defaults."""
    if isinstance(value, Config) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return {
            name: found
            for name, default in defaults_of(type(value)).items()
            if (found := identity_of(getattr(value, name))) != default
        }
    if isinstance(value, Mapping):
        return {str(name): identity_of(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [identity_of(inner) for inner in value]
    return to_jsonable_python(value)


def defaults_of(config: type[Any]) -> dict[str, Any]:
    """Return what keys leave out: the default of every field that can change the output, in the form of `identity_of`.

    Args:
        config: a `Config`, or a dataclass of `ldm_core.configs`. A field without a default has REQUIRED.
    """
    if issubclass(config, Config):
        return {
            name: REQUIRED if field.is_required() else identity_of(field.get_default(call_default_factory=True))
            for name, field in config.model_fields.items()
            if not is_runtime(field)
        }
    return {field.name: _default_of(field) for field in dataclasses.fields(config)}


def _default_of(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return identity_of(field.default)
    return identity_of(field.default_factory()) if field.default_factory is not dataclasses.MISSING else REQUIRED


def runtime(default: Any = ..., **options: Any) -> Any:
    """Declare a field that is no part of a key: worker counts, time limits, log options; and paths: contents count."""
    return Field(default, json_schema_extra={"runtime": True}, **options)


def is_runtime(field: Any) -> bool:
    """Return whether a model's field was declared with `runtime`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("runtime"))


def expand_preset(value: Any, get: Callable[[str], Any]) -> Any:
    """Expand `"kl-f8"` or `{preset: "kl-f8", base_channels: 64}` to plain fields; return anything else as it is.

    Args:
        value: what the recipe says.
        get: returns a preset's configuration dataclass by name; raises ValueError for unknown names.
    """
    if isinstance(value, str):
        return get(value)
    if isinstance(value, dict) and "preset" in value:
        changes = {name: field for name, field in value.items() if name != "preset"}
        return merge(dataclasses.asdict(get(value["preset"])), changes)
    return value


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay `changes` over `base`, mapping by mapping; fields laid over a preset's name extend that preset."""
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        if isinstance(inner, str) and isinstance(value, dict):
            inner = {"preset": inner}
        merged[name] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
