"""Read settings of the code release's configurations; refuse by name what would be lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Settings = Mapping[str, Any]


def check(
    settings: Settings, where: str, *, read: Iterable[str], fixed: Settings | None = None, ignored: Iterable[str] = ()
) -> None:
    """Refuse every setting that would be lost.

    Args:
        settings: a section of a configuration file.
        where: the section's name, for error messages.
        read: names of settings that are translated.
        fixed: settings that our networks do not have, with the value of theirs that ours compute.
        ignored: names of settings that do not affect what a network computes.

    Raises:
        ValueError: a setting is none of these, or fixed to another value; names it and its value.
    """
    fixed = fixed or {}
    known = {*fixed, *read, *ignored}
    for name, value in settings.items():
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{where}.{name} must be a plain value, got the interpolation {value!r}")
        if name in fixed and value != fixed[name]:
            raise ValueError(f"{where}.{name} must be {fixed[name]!r}, got {value!r}: our networks have nothing else")
        if name not in known:
            raise ValueError(f"{where}.{name} has no counterpart here, got {value!r}")


def section(settings: Any, name: str) -> Settings:
    """Return a nested section. Raises ValueError if there is none."""
    found = settings.get(name) if isinstance(settings, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"the configuration must have a section {name!r}, got {found!r}")
    return found


def needed(settings: Settings, name: str) -> Any:
    """Return a setting that has no default. Raises ValueError if it is missing."""
    if settings.get(name) is None:
        raise ValueError(f"the configuration lacks {name}")
    return settings[name]


def differing(ours: Any, others: Any, path: str = "") -> list[str]:
    """List `path=value` for every value in the nested mapping `ours` that differs in `others`."""
    if isinstance(ours, Mapping) and isinstance(others, Mapping):
        inner = ((f"{path}.{key}".strip("."), value, others.get(key)) for key, value in ours.items())
        return [each for place, value, other in inner for each in differing(value, other, place)]
    return [] if ours == others else [f"{path}={ours!r}"]
