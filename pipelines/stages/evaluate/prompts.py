"""What evaluation asks for: prompts of the recipe, of a file, and captions of the training set with their pictures."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import UserError
from pipelines.stages.evaluate.config import EvaluateConfig
from pipelines.store.location import Location
from pipelines.store.storage import sha256_file


@dataclass(frozen=True)
class Prompt:
    """One picture to sample.

    Attributes:
        text: the caption.
        expected: what a detector should see, as the prompts file says; empty where nothing is known.
    """

    text: str
    expected: dict[str, Any] = field(default_factory=dict)


def prompts_digest(config: EvaluateConfig) -> dict[str, str]:
    """What the prompts file adds to the artifact's key: its sha256. Raises UserError where it is missing."""
    return {} if config.prompts_file is None else {"prompts_file": sha256_file(config.prompts_file)}


def load_prompts(config: EvaluateConfig) -> list[Prompt]:
    """The recipe's prompts, then the file's.

    Raises:
        UserError: the file is missing, is not UTF-8, has a row without `prompt`, or holds none; says which
            line.
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
    parse = _json_prompt if path.endswith(".jsonl") else _text_prompt
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
