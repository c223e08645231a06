"""`ldm demo`: the whole pipeline on pictures rendered on the spot and served over local HTTP."""

import sys
import time
from pathlib import Path

import click

from jobs.commands.run import print_result, result_json
from jobs.console import console, emit_json, json_option
from jobs.demo.dataset import PICTURES_HOST, SLOW_HOST, DemoData, prepare
from jobs.demo.web import DemoWeb
from jobs.progress import Display
from jobs.recipes import recipe_path
from pipelines.run.plan import STAGE_NAMES, Selection
from pipelines.run.recipe import load_recipe
from pipelines.run.results import RunResult

NEXT = """
[bold]what next[/bold]
  {ldm} ui {root}                                     the experiment in MLflow
  {ldm} sample {root} "a large red star on the left"  pictures for your own words
  {ldm} demo --root {root} --force latents            one stage again; the same bytes leave the rest cached
  {ldm} inspect {root}                                what is in there"""


@click.command()
@click.option("--root", default="runs/demo", show_default=True, help="Folder for everything that the demo makes.")
@click.option("--pictures", default=4000, show_default=True, type=click.IntRange(50), help="Pictures to render.")
@click.option("--port", default=0, show_default=True, help="Port of the local web server; 0 takes a free one.")
@click.option("--force", type=click.Choice(STAGE_NAMES), multiple=True, help="Run a stage again; may be repeated.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a key of the demo's recipe.")
@json_option
@click.pass_obj
def demo(
    debug: bool,
    root: str,
    pictures: int,
    port: int,
    force: tuple[str, ...],
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run the whole pipeline, from a table of URLs to a text-to-image model.

    Renders captioned pictures of coloured shapes, serves them over HTTP on this machine together with what the real
    web serves (404s, truncated files, duplicates, …), and runs every stage on them. Called again, everything is
    cached.

    \b
    Example:
      ldm demo --root runs/demo
    """
    # Imports Ray, which takes a second that `ldm demo --help` should not cost.
    from pipelines.run.walk import run as run_pipeline

    started = time.monotonic()
    out = console(as_json)
    with out.status("rendering pictures"):
        data = prepare(Path(root), pictures=pictures)
    rows = sum(data.counts.values())
    out.print(f"{rows:,} rows, {data.counts['picture']:,} good pictures among them, in {data.table}", markup=False)
    with DemoWeb(data.web, port) as web, Display(out) as display:
        recipe = load_recipe(recipe_path("demo"), (*_overrides(root, data, web.port), *overrides))
        result = run_pipeline(recipe, Selection(force=force), display, debug=debug)
    result.wall_s = round(time.monotonic() - started, 3)
    accuracy, samples = _alignment(result)
    print_result(out, result)
    if accuracy is not None:
        out.print(f"alignment   {accuracy:.1%} of {samples} held-out captions drawn with the right colour and shape")
    # What was typed may not be on the PATH: `make demo` calls .venv/bin/ldm.
    called = sys.argv[0] if Path(sys.argv[0]).name == "ldm" else "ldm"
    out.print(NEXT.format(root=root, ldm=called))
    if as_json:
        emit_json({"alignment_accuracy": accuracy, "alignment_samples": samples, **result_json(result)})


def _overrides(root: str, data: DemoData, port: int) -> tuple[str, ...]:
    hosts = ", ".join(f'{host}: "127.0.0.1:{port}"' for host in (PICTURES_HOST, SLOW_HOST))
    return (
        f"root={root}",
        f"pairs.source={data.table}",
        f"pairs.download.connect_to={{{hosts}}}",
        f"evaluate.prompts_file={data.prompts}",
    )


def _alignment(result: RunResult) -> tuple[float | None, int]:
    evaluated = result.artifacts.get("evaluate")
    details = evaluated.details if evaluated else {}
    return details.get("alignment_accuracy"), details.get("alignment_samples", 0)
