"""Tables and bars on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.drawing.formatting import format_count

BAR_CHARACTERS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"


def table_of(*columns: tuple[str, Any]) -> Table:
    """Return an empty table with columns of these headings, each `left` or `right`."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading, justify in columns:
        table.add_column(heading, justify=justify, overflow="fold")
    return table


def draw_histogram(title: str, edges: Sequence[float], counts: Sequence[int]) -> Table:
    """Draw counts[i] of what lies from edges[i] to edges[i + 1], or beyond the last edge; a line for each i.

    At least one count must be positive; empty ones before the first and after the last are left out.
    """
    filled = [index for index, count in enumerate(counts) if count]
    table = Table(box=None, title=title, title_justify="left", title_style="bold", show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(min_width=BAR_CHARACTERS)
    for index in range(filled[0], filled[-1] + 1):
        after = f" – {edges[index + 1]:g}" if index + 1 < len(edges) else " and more"
        bar = Text(draw_bar(counts[index] / max(counts)), "cyan")
        table.add_row(f"{edges[index]:g}{after}", format_count(counts[index]), bar)
    return table


def draw_bar(share: float) -> str:
    """Draw a bar as long as the share, to an eighth of a character; anything at all is seen."""
    eighths = max(round(8 * BAR_CHARACTERS * share), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
