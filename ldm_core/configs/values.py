"""Build configs from the plain values of JSON and YAML, and check their fields; errors name the setting to change."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


def component(kind: type, values: Mapping[str, Any], path: str) -> Any:
    """Build a config from plain values.

    Args:
        kind: the config's dataclass.
        values: its settings by name; lists become tuples.
        path: where these settings stand, for error messages.

    Raises:
        ValueError: the values are no mapping, or a setting is unknown, missing or null.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must be a mapping of settings, got {values!r}")
    check_keys(kind, values, path)
    # JSON has no tuples; configs are hashable and therefore hold no lists.
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raise ValueError unless each of these fields of a config is at least that large, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{type(config).__name__}.{name} must be at least {least}, got {value}")


def check_keys(kind: type, values: Mapping[str, Any], path: str) -> None:
    """Raise ValueError for a setting that the dataclass `kind` does not have, for a missing one and for a null."""
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
