"""The prompts that evaluation samples: those of the recipe and those of a file."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import UserError
from pipelines.stages.evaluate.config import EvaluateConfig
from pipelines.store.location import Location
from pipelines.store.storage import sha256_file

JSON_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what its picture should show.

    Attributes:
        text: the caption.
        expected: what a detector should see, from the prompts file; empty if the file does not say.
    """

    text: str
    expected: dict[str, Any] = field(default_factory=dict)


def prompts_digest(config: EvaluateConfig) -> dict[str, str]:
    """Return what the prompts file adds to the artifact's key: its sha256, and how it is read.

    Raises:
        UserError: it is missing.
    """
    if config.prompts_file is None:
        return {}
    kind = "jsonl" if config.prompts_file.endswith(JSON_SUFFIX) else "text"
    return {"prompts_file": sha256_file(config.prompts_file), "prompts_format": kind}


def load_prompts(config: EvaluateConfig) -> list[Prompt]:
    """Return the recipe's prompts, then those of its file.

    Raises:
        UserError: the file is missing, is not UTF-8, holds no prompts, or has a row without `prompt`; names the line.
    """
    prompts = [Prompt(text) for text in config.prompts]
    if config.prompts_file is None:
        return prompts
    path = config.prompts_file
    try:
        text = io.StringIO(Location.of(path).read().decode(), newline=None)
    except FileNotFoundError:
        raise UserError(f"evaluate.prompts_file {path} is missing") from None
    except UnicodeDecodeError as error:
        raise UserError(f"evaluate.prompts_file {path} is not UTF-8 text ({error})") from error
    lines = [(number, line) for number, line in enumerate(text, start=1) if line.strip()]
    if not lines:
        raise UserError(f"evaluate.prompts_file {path} holds no prompts: write one a line")
    parse = _json_prompt if path.endswith(JSON_SUFFIX) else _text_prompt
    return prompts + [parse(line, f"{path} line {number}") for number, line in lines]


def _text_prompt(line: str, place: str) -> Prompt:
    return Prompt(line.rstrip("\r\n"))


def _json_prompt(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"evaluate.prompts_file {place} is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f"evaluate.prompts_file {place} needs a string `prompt`, got {line.strip()[:80]}")
    return Prompt(row.pop("prompt"), row)
