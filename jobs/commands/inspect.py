"""`ldm inspect`: what is in an artifact, a shard or a root."""

import json
from typing import Any

import click
from rich.console import Console

from jobs.console import console, emit_json, json_option


@click.command()
@click.argument("path")
@json_option
def inspect(path: str, as_json: bool) -> None:
    """What is in PATH: an artifact, a shard (.tar), a checkpoint folder, or the root of a run.

    \b
    Example:
      ldm inspect runs/demo
      ldm inspect runs/demo/pairs/*/000000.tar
    """
    from pipelines.inspect import inspect_path

    facts = inspect_path(path)
    _print(console(as_json), facts)
    if as_json:
        emit_json(facts)


def _print(out: Console, facts: dict[str, Any], indent: str = "") -> None:
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            out.print(f"{indent}{name}", markup=False)
            _print(out, value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            out.print(f"{indent}{name}", markup=False)
            for item in value:
                out.print(f"{indent}  {json.dumps(item, ensure_ascii=False)}", markup=False)
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            out.print(f"{indent}{name:<18} {shown}", markup=False)
