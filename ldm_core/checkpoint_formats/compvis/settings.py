"""Settings of other programs' configurations: read, accepted because they change nothing, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Settings = Mapping[str, Any]


def check(
    settings: Settings, where: str, *, read: Iterable[str], fixed: Settings | None = None, ignored: Iterable[str] = ()
) -> None:
    """Refuse every setting that would be lost.

    Args:
        settings: what a file says.
        where: the section, for the message.
        read: names that are translated.
        fixed: names with the only value that our networks have.
        ignored: names that change nothing that a network computes.

    Raises:
        ValueError: a setting is none of these; names it and its value.
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
    """A nested mapping. Raises ValueError where there is none."""
    found = settings.get(name) if isinstance(settings, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"the configuration must have a section {name!r}, got {found!r}")
    return found


def needed(settings: Settings, name: str) -> Any:
    """A setting that has no default. Raises ValueError where it is missing."""
    if settings.get(name) is None:
        raise ValueError(f"the configuration lacks {name}")
    return settings[name]


def differing(ours: Any, others: Any, path: str = "") -> list[str]:
    """`path=value` of everything in `ours`, nested mappings, that is something else in `others`."""
    if isinstance(ours, Mapping) and isinstance(others, Mapping):
        inner = ((f"{path}.{key}".strip("."), value, others.get(key)) for key, value in ours.items())
        return [each for place, value, other in inner for each in differing(value, other, place)]
    return [] if ours == others else [f"{path}={ours!r}"]
