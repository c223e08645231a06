"""`ldm inspect`: show what is in an artifact, a shard or a root."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from jobs.console import console, emit_json, json_option
from pipelines.drawing.printable import printable
from pipelines.inspection.inspect import inspect_path, view, write_contact_sheet


@click.command()
@click.argument("path")
@click.option(
    "--contact-sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Also draw a picture. Of pairs, a shard of them, or a root: 48 random samples with their captions. Of latents "
    "or a shard of them: samples beside what their latents decode to, and how channels, tokens and bytes are spread.",
)
@json_option
def inspect(path: str, contact_sheet: Path | None, as_json: bool) -> None:
    """Show what is in PATH: an artifact (finished or not), a shard (.tar), a model folder, or the root of a run.

    \b
    Example:
      ldm inspect runs/demo
      ldm inspect runs/demo --contact-sheet samples.png
      ldm inspect runs/demo/pairs/KEY/000000.tar
    """
    facts = inspect_path(path)
    out = console(as_json)
    if (shown := view(facts)) is not None:
        out.print(shown, soft_wrap=False)
    else:
        _print(out, facts)
    if contact_sheet:
        write_contact_sheet(path, contact_sheet)
        facts["contact_sheet"] = str(contact_sheet)
        out.print(f"\ncontact sheet  {contact_sheet}", markup=False)
    if as_json:
        emit_json(facts)


def _print(out: Console, facts: dict[str, Any], indent: str = "") -> None:
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            out.print(f"{indent}{printable(name)}", markup=False)
            _print(out, value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            out.print(f"{indent}{printable(name)}", markup=False)
            for item in value:
                out.print(f"{indent}  {printable(json.dumps(item, ensure_ascii=False))}", markup=False)
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            out.print(f"{indent}{printable(name):<18} {printable(shown)}", markup=False)
