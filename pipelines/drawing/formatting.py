"""Numbers as people read them, in the report and on the terminal."""

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def format_bytes(count: float) -> str:
    """Return a size in binary units: 1536 is 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Return a time span in the two units that matter: 93.4 is 1 min 33 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_age(seconds: float) -> str:
    """Return how long ago something was, in one unit: 93.4 is 1 min, three days are 3 d."""
    if seconds < 60:
        return f"{max(seconds, 0):.0f} s"
    for unit, length in (("d", 86_400), ("h", 3600)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds // 60:.0f} min"


def format_count(count: int | None) -> str:
    """Return a count with thousands separated, 4060 as 4,060; nothing for an unknown one."""
    return "" if count is None else f"{count:,}"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Draw values as a line of blocks between the first and the last of them, averaged into at most `width` columns.

    Values that are not finite are left out; without any other, the line is empty.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    size = math.ceil(len(values) / width)
    chunks = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(chunk) / len(chunk) for chunk in chunks]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    blocks = "".join(BLOCKS[int((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)
    return f"{means[0]:.4f} {blocks} {means[-1]:.4f}"
