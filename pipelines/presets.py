"""Model presets inside recipes: a name, or fields, or a name with some fields changed."""

import dataclasses
from collections.abc import Callable
from typing import Any


def expand_preset(value: Any, get: Callable[[str], Any]) -> Any:
    """`"kl-f8"` or `{preset: "kl-f8", base_channels: 64}` to plain fields; anything else is returned as it is.

    Args:
        value: what the recipe says.
        get: the preset's name to its configuration dataclass; ValueError for unknown names.
    """
    if isinstance(value, str):
        return get(value)
    if isinstance(value, dict) and "preset" in value:
        changes = {name: field for name, field in value.items() if name != "preset"}
        return merge(dataclasses.asdict(get(value["preset"])), changes)
    return value


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`, mapping by mapping; fields laid over a preset's name extend that preset."""
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        if isinstance(inner, str) and isinstance(value, dict):
            inner = {"preset": inner}
        merged[name] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
