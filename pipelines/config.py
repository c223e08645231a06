"""The base of every typed configuration: unknown keys are refused; each field says whether it can change the output."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python


class Config(BaseModel):
    """A section of a recipe: immutable, and unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """Return what an artifact's key is made of: the settings that differ from their defaults, as JSON values.

        So a field that is added later, with what was done before as its default, keeps every key. In return, a default
        that changes must raise the format version of its stage (held by tests/jobs/test_golden_defaults.py).
        """
        found = {}
        for name, field in type(self).model_fields.items():
            value = identity_of(getattr(self, name))
            is_default = not field.is_required() and value == identity_of(field.get_default(call_default_factory=True))
            if not is_runtime(field) and not is_default:
                found[name] = value
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
    if isinstance(value, Config):
        return value.identity()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: found
            for field in dataclasses.fields(value)
            if (found := identity_of(getattr(value, field.name))) != identity_of(_default(field))
        }
    if isinstance(value, Mapping):
        return {str(name): identity_of(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [identity_of(inner) for inner in value]
    return to_jsonable_python(value)


def _default(field: "dataclasses.Field[Any]") -> Any:
    """Return a dataclass field's default; for one without, a value that equals no setting."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else _NO_DEFAULT


# In the form that it takes in a key, where no setting is such a list.
_NO_DEFAULT = ["no default"]


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
