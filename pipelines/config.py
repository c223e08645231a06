"""The base of every typed configuration: unknown keys are refused; each field says whether it can change the output."""

import dataclasses
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from pipelines.secrets import find_secret

# The type of the problem that pydantic reports for a value with a password or token; its `path` leads to the value.
SECRET = "secret"


class Config(BaseModel):
    """A section of a recipe: immutable, and unknown keys are an error."""

    # Inputs are hidden, since a URL among them may hold a password.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        """Refuse passwords and tokens anywhere: what is configured is written to recipes, manifests and reports."""
        if (path := find_secret(value)) is not None:
            raise PydanticCustomError(SECRET, "must not hold a password, token or signature", {"path": path})
        return value

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change the output, as JSON values, for the artifact's key."""
        values = self.model_dump(mode="json")
        return {
            name: (inner.identity() if isinstance(inner := getattr(self, name), Config) else values[name])
            for name, field in type(self).model_fields.items()
            if not is_runtime(field)
        }


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
