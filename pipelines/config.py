"""The base of every typed configuration: unknown keys are refused; each field says whether it can change the output."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A section of a recipe. Immutable; unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """The fields that can change the output, as JSON values: what an artifact's key is made of."""
        values = self.model_dump(mode="json")
        return {
            name: (inner.identity() if isinstance(inner := getattr(self, name), Config) else values[name])
            for name, field in type(self).model_fields.items()
            if not is_runtime(field)
        }


def runtime(default: Any = ..., **options: Any) -> Any:
    """A field that is no part of a key: worker counts, time limits, log options; and paths, whose contents count."""
    return Field(default, json_schema_extra={"runtime": True}, **options)


def is_runtime(field: Any) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("runtime"))
