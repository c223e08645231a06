"""`ldm gc`: remove what is of no more use under a root."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from jobs.console import console, emit_json, json_option
from pipelines.drawing.formatting import format_bytes

if TYPE_CHECKING:
    from pipelines.inspection.garbage import Garbage, Kept

DAY_S = 86_400


@click.command()
@click.argument("root")
@click.option("--yes", is_flag=True, help="Delete; without it what would go is only shown.")
@click.option(
    "--forget",
    multiple=True,
    metavar="RUN",
    help="Also remove this run: what it stands on is no longer kept for it; may be repeated.",
)
@click.option(
    "--older-than",
    "older_than_days",
    type=click.FloatRange(min=0),
    default=7.0,
    show_default=True,
    metavar="DAYS",
    help="Unfinished work that a run can go on with stays for so long after it was last written to.",
)
@json_option
def gc(root: str, yes: bool, forget: tuple[str, ...], older_than_days: float, as_json: bool) -> None:
    """Show what is of no more use under ROOT, and delete it with --yes.

    Superseded generations, unfinished artifacts that nobody goes on with, what killed processes left. Nothing that a
    run stands on, that a finished artifact was made from, or that somebody holds.

    \b
    Example:
      ldm gc runs/demo
      ldm gc s3://bucket/run --forget 20260101-120000-small-1a2b --yes
    """
    # Here, because `ldm gc --help` needs no pyarrow.
    from pipelines.inspection.catalogue import open_root
    from pipelines.inspection.garbage import delete, find_garbage

    storage = open_root(root).root
    found = find_garbage(storage, older_than_days * DAY_S, forget)
    left = delete(storage, found) if yes else []
    out = console(as_json)
    total = sum(each.bytes for each in found.garbage) - sum(each.bytes for each in left)
    if found.garbage:
        out.print(_garbage(found.garbage), soft_wrap=False)
    if found.kept or left:
        out.print(*([""] if found.garbage else []), _kept([*found.kept, *left]), sep="\n", soft_wrap=False)
    out.print(_last_line(storage.url, found.garbage, total, yes), markup=False)
    if as_json:
        emit_json(
            {
                "root": storage.url,
                "deleted": yes,
                "bytes": total,
                "garbage": [_json(each) for each in found.garbage],
                "kept": [dataclasses.asdict(each) for each in found.kept],
                "left": [dataclasses.asdict(each) for each in left],
            }
        )


def _last_line(url: str, garbage: list[Garbage], total: int, yes: bool) -> str:
    if not garbage:
        return f"nothing to delete under {url}"
    return f"deleted {format_bytes(total)}" if yes else f"{format_bytes(total)} in all: the same with --yes deletes it"


def _garbage(garbage: list[Garbage]) -> Table:
    table = _table("delete", "what", "files", "bytes", "why")
    for each in garbage:
        if each.kind != "lock":
            table.add_row(Text(each.place), each.kind, f"{each.files:,}", format_bytes(each.bytes), Text(each.why))
    if locks := [each for each in garbage if each.kind == "lock"]:
        place = locks[0].place if len(locks) == 1 else f"{locks[0].place} and {len(locks) - 1} more"
        table.add_row(Text(place), "lock", "", "", locks[0].why)
    return table


def _kept(kept: list[Kept]) -> RenderableType:
    table = _table("keep", "bytes", "why")
    for each in kept:
        table.add_row(Text(each.place), format_bytes(each.bytes) if each.bytes else "", Text(each.why))
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        right = heading in ("files", "bytes")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _json(garbage: Garbage) -> dict[str, Any]:
    return {
        "kind": garbage.kind,
        "place": garbage.place,
        "why": garbage.why,
        "files": garbage.files,
        "bytes": garbage.bytes,
    }
