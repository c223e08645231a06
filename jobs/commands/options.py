"""Options that several commands share."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from jobs.recipes import recipe_path
from pipelines.errors import MisuseError
from pipelines.run.plan import STAGE_NAMES, Selection
from pipelines.run.recipe import Recipe, load_recipe

Command = TypeVar("Command", bound=Callable[..., Any])


def recipe_options(command: Command) -> Command:
    """Add RECIPE, --root and --set to a command."""
    for decorate in (
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="A.B=C",
            help="Override a key of the recipe; may be repeated.",
        ),
        click.option("--root", help="Where artifacts go: a folder or an fsspec URL (the recipe's `root`)."),
        click.argument("recipe_name", metavar="RECIPE"),
    ):
        command = decorate(command)
    return command


def selection_options(command: Command) -> Command:
    """Add --only, --from, --to and --force to a command."""
    stage = click.Choice(STAGE_NAMES)
    for decorate in (
        click.option(
            "--force",
            type=stage,
            multiple=True,
            help="Run a stage again although it is cached; may be repeated.",
        ),
        click.option("--to", "last", type=stage, help="Stop after this stage."),
        click.option("--from", "first", type=stage, help="Start at this stage; the ones before must be cached."),
        click.option("--only", type=stage, help="Run this stage alone; what it reads must be cached."),
    ):
        command = decorate(command)
    return command


def open_recipe(recipe_name: str, root: str | None, overrides: tuple[str, ...]) -> Recipe:
    """Load a recipe by path or shipped name, overridden by the options."""
    if recipe_name == "demo":
        raise MisuseError("the demo's recipe needs the pictures that the demo makes: start it with `ldm demo`")
    chosen = (f"root={json.dumps(root)}",) if root else ()
    return load_recipe(recipe_path(recipe_name), (*overrides, *chosen))


def selection(only: str | None, first: str | None, last: str | None, force: tuple[str, ...]) -> Selection:
    """Return what the selection options ask for. Raises MisuseError if they contradict each other."""
    return Selection(only=only, first=first, last=last, force=force)
