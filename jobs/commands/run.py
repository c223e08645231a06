"""`ldm run`: walk the stages of a recipe."""

import dataclasses
from typing import Any

import click
from rich.console import Console

from jobs.commands.options import open_recipe, recipe_options, selection, selection_options
from jobs.console import console, emit_json, json_option
from jobs.progress import Display, stage_table
from pipelines.drawing.formatting import format_seconds
from pipelines.run.plan import STAGES
from pipelines.run.results import RunResult


@click.command()
@recipe_options
@selection_options
@click.option(
    "--wait/--no-wait",
    default=True,
    show_default=True,
    help="Wait for an artifact that another run is making, or refuse.",
)
@json_option
@click.pass_obj
def run(
    debug: bool,
    recipe_name: str,
    root: str | None,
    overrides: tuple[str, ...],
    only: str | None,
    first: str | None,
    last: str | None,
    force: tuple[str, ...],
    wait: bool,
    as_json: bool,
) -> None:
    """Run a recipe: every stage that is not cached yet.

    RECIPE is a YAML file or the name of a shipped recipe. Killed at any moment, the same command continues where it
    was.

    \b
    Example:
      ldm run small --set pairs.source=photos/metadata.jsonl \\
          --set pairs.columns.image=file --set pairs.columns.text=captions
      ldm run small ... --only latents --force latents
    """
    # Imports Ray, which takes a second that `ldm run --help` should not cost.
    from pipelines.run.walk import run as run_pipeline

    recipe = open_recipe(recipe_name, root, overrides)
    out = console(as_json)
    with Display(out) as display:
        result = run_pipeline(recipe, selection(only, first, last, force), display, debug=debug, wait=wait)
    print_result(out, result)
    if as_json:
        emit_json(result_json(result))


def print_result(out: Console, result: RunResult) -> None:
    """Print the table of stages, and where everything is."""
    out.print(stage_table(result))
    places = {"report": result.report, **_outputs(result), "mlflow": result.tracking_uri}
    out.print()
    for name, place in places.items():
        if place:
            out.print(f"{name:<11} {place}")
    out.print(f"{'wall time':<11} {format_seconds(result.wall_s)}")


def result_json(result: RunResult) -> dict[str, Any]:
    """Return a run as one JSON object."""
    return {
        "wall_s": result.wall_s,
        "stages": [dataclasses.asdict(row) for row in result.rows],
        "root": result.root,
        "tracking_uri": result.tracking_uri,
        "run_id": result.run_id,
        "report": result.report,
        **_outputs(result),
    }


def _outputs(result: RunResult) -> dict[str, str]:
    """Return the files that a person opens, by what they are called; the last stage's first."""
    return {
        name: f"{result.artifacts[stage.name].storage.url}/{file}"
        for stage in reversed(STAGES)
        if stage.name in result.artifacts
        for name, file in stage.outputs.items()
    }
