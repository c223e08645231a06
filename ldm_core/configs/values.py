"""Configs from plain values, as JSON and YAML hold them; every mistake is named, with the nearest setting."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


def component(kind: type, values: Mapping[str, Any], path: str) -> Any:
    """The config of a kind from plain values; raises ValueError, naming `path`, for anything else."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must be a mapping of settings, got {values!r}")
    check_keys(kind, values, path)
    # JSON has no tuples; configs are hashable and therefore hold no lists.
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def check_keys(kind: type, values: Mapping[str, Any], path: str) -> None:
    """Raise ValueError for settings that a dataclass does not have, or lacks."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f": it has {', '.join(fields)}"
            raise ValueError(f"{path} has no setting {key!r}{hint}")
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    if empty := [name for name in values if values[name] is None and "None" not in str(fields[name].type)]:
        raise ValueError(f"{path} must set {', '.join(empty)}, got null")
    missing = [
        name for name, field in fields.items() if name not in values and (field.default, field.default_factory) == unset
    ]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
