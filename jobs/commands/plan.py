"""`ldm plan`: show what `ldm run` would do, without running anything."""

from typing import Any

import click
from rich.table import Table

from jobs.commands.options import open_recipe, recipe_options, selection, selection_options
from jobs.console import console, emit_json, json_option
from pipelines.drawing.formatting import format_bytes, format_seconds
from pipelines.run.estimate import Estimate, estimate
from pipelines.run.plan import plan as plan_pipeline


@click.command()
@recipe_options
@selection_options
@json_option
def plan(
    recipe_name: str,
    root: str | None,
    overrides: tuple[str, ...],
    only: str | None,
    first: str | None,
    last: str | None,
    force: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what `ldm run` would do with the same arguments: each stage's key and state, and what it will cost.

    Figures of stages that have not run are estimates, marked with ~; a time is known once such a stage has run under
    the root.

    \b
    Example:
      ldm plan small --set pairs.source=photos/metadata.jsonl
    """
    recipe = open_recipe(recipe_name, root, overrides)
    walk = plan_pipeline(recipe, selection(only, first, last, force))
    estimates = estimate(recipe, walk)
    rows: list[dict[str, Any]] = [
        {
            "name": planned.stage.name,
            "state": planned.state,
            "key": planned.key,
            "rows": guess.rows,
            "bytes": guess.bytes,
            "seconds": guess.seconds,
            "estimated": guess.estimated,
        }
        for planned, guess in zip(walk, estimates)
    ]
    out = console(as_json)
    out.print(_table(rows, estimates))
    if as_json:
        emit_json({"root": recipe.root, "stages": rows})


def _table(rows: list[dict[str, Any]], estimates: list[Estimate]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("stage", "state", "key"):
        table.add_column(heading)
    for heading in ("rows", "bytes", "time"):
        table.add_column(heading, justify="right")
    for row, guess in zip(rows, estimates):
        mark = "~" if guess.estimated else ""
        table.add_row(
            row["name"],
            row["state"],
            row["key"],
            "?" if guess.rows is None else f"{mark}{guess.rows:,}",
            "?" if guess.bytes is None else f"{mark}{format_bytes(guess.bytes)}",
            "?" if guess.seconds is None else f"{mark}{format_seconds(guess.seconds)}",
        )
    return table
