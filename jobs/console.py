"""Output of the commands: text for people, and for scripts one JSON object as the last line of stdout."""

import json
import sys
from typing import Any

import click
from rich.console import Console

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of stdout.")


def console(as_json: bool = False) -> Console:
    """Return the console for people: stdout, or stderr if stdout is kept for JSON."""
    return Console(stderr=as_json, highlight=False, soft_wrap=True)


def emit_json(value: Any) -> None:
    """Write one line of JSON to stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
