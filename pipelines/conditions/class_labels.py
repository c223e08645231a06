"""A class label for every picture, one learned embedding each (paper, Sec. 4.3.1 and Table 15).

Latents cache `KEY.class.npy`, the class's number as an int32 scalar, and `classes.json` once: the names in order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_core.conditioning.interface import Encode
from ldm_core.configs.conditioning import ClassConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.unet import UNetConfig
from pipelines.conditions.config import ClassCondition
from pipelines.conditions.examples import ClassExamples
from pipelines.conditions.kind import Pair, Rows
from pipelines.errors import UserError
from pipelines.shards.format import encode_npy
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact, digest_json
from pipelines.store.storage import Storage, encode_json

CLASS = "class.npy"
CLASSES_FILE = "classes.json"
# A column with more distinct values is not one of classes, but of captions or identifiers.
MOST_CLASSES = 100_000
# As many names as a message shows.
SHOWN = 8


class ClassLabels:
    """The kind `class`."""

    files: tuple[str, ...] = (CLASS,)
    from_facts = True

    def __init__(self, config: ClassCondition) -> None:
        self.config = config

    def prepare(self, rows: Rows, writer: ArtifactWriter) -> None:
        names = self._names(rows)
        writer.commit_once(CLASSES_FILE, lambda path: path.write_bytes(encode_json(names)))

    def _names(self, rows: Rows) -> list[str]:
        """Return the names of the classes in order, after a look at every sample's."""
        column, found = self.config.column, set[str | None]()
        for names in rows.values(column, _distinct):
            found.update(names)
            if len(found) > MOST_CLASSES:
                raise UserError(
                    f"the column {column!r} has more than {MOST_CLASSES:,} distinct values, too many for classes: "
                    "set condition.column to the one that names the class"
                )
        if None in found:
            raise UserError(
                f"some pairs have no {column!r}, which names their class: leave them out with a rule on it in "
                "pairs.filters, or set condition.column"
            )
        present = {name for name in found if name is not None}
        if self.config.classes is None:
            return sorted(present, key=_in_order)
        if unknown := sorted(present - set(self.config.classes)):
            raise UserError(
                f"condition.classes lacks {', '.join(unknown[:SHOWN])}, which pairs have as {column!r}: add them, or "
                "leave such pairs out with a rule in pairs.filters"
            )
        return list(self.config.classes)

    def digest(self, storage: Storage) -> str:
        return digest_json([self.config.column, storage.read_json(CLASSES_FILE)])

    def encoder(self, storage: Storage, device: str, encode_images: Encode | None) -> ClassNumbers:
        return ClassNumbers(self.config.column, storage.read_json(CLASSES_FILE))

    def details(self, storage: Storage) -> dict[str, Any]:
        return {"classes": len(storage.read_json(CLASSES_FILE))}

    def conditioner(self, latents: Artifact, unet: UNetConfig) -> ClassConfig:
        names = tuple(latents.storage.read_json(CLASSES_FILE))
        if unet.context_dim is None:
            raise ValueError("diffusion.unet.context_dim must be the width of a class's embedding, got null: set it")
        guided = self.config.dropout > 0
        return ClassConfig(classes=len(names) + guided, width=unet.context_dim, unconditional_class=guided, names=names)

    def frozen(self, latents: Artifact, device: torch.device) -> None:
        return None

    def examples(self, latents: Artifact) -> ClassExamples:
        return ClassExamples(CLASS, latents.details["classes"], self.config.dropout)

    def prompts(self, latents: Artifact, model: LatentDiffusionConfig) -> ClassPrompts:
        assert isinstance(model.conditioner, ClassConfig)
        return ClassPrompts(model.conditioner)

    def preview_prompts(self, latents: Artifact, samples: Iterable[Mapping[str, Any]], count: int) -> list[str]:
        names: list[str] = latents.storage.read_json(CLASSES_FILE)
        return names[:count]

    def prompt_of(self, facts: Mapping[str, Any]) -> str:
        return name_of(facts.get(self.config.column)) or ""


class ClassNumbers:
    """Looks up the number of a sample's class.

    Args:
        column: the fact that names the class.
        names: the classes in order.
    """

    def __init__(self, column: str, names: Sequence[str]) -> None:
        self.column = column
        self.numbers = {name: number for number, name in enumerate(names)}

    def encode(self, pairs: Sequence[Pair]) -> list[dict[str, bytes]]:
        return [{CLASS: encode_npy(np.array(self._number(pair), np.int32))} for pair in pairs]

    def _number(self, pair: Pair) -> int:
        name = name_of(pair.facts.get(self.column))
        if name is None or name not in self.numbers:
            raise UserError(
                f"sample {pair.key} has {pair.facts.get(self.column)!r} as {self.column!r}, which is none of the "
                f"{len(self.numbers)} classes: run `ldm run RECIPE --force latents`"
            )
        return self.numbers[name]


class ClassPrompts:
    """Prompts as names of classes, or as their numbers; the empty one asks for no class in particular."""

    tokenizer = None
    guided = True

    def __init__(self, config: ClassConfig) -> None:
        self.config = config
        self.numbers = {name: number for number, name in enumerate(self.config.names)}

    def inputs(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self._number(prompt.strip()) for prompt in prompts])

    def _number(self, prompt: str) -> int:
        config = self.config
        if (number := self.numbers.get(prompt)) is not None:
            return number
        if not prompt and config.unconditional_class:
            return config.classes - 1
        # A model from elsewhere does not say what its classes are called.
        if not self.numbers and prompt.isdecimal() and int(prompt) < config.classes:
            return int(prompt)
        near = difflib.get_close_matches(prompt, self.numbers, n=1)
        shown = ", ".join(list(self.numbers)[:SHOWN]) or f"0 to {config.classes - 1}"
        hint = f"did you mean {near[0]!r}?" if near else f"its classes are {shown}"
        more = f" and {len(self.numbers) - SHOWN} more" if len(self.numbers) > SHOWN and not near else ""
        raise UserError(f"this model's prompts are names of classes, and {prompt[:80]!r} is none; {hint}{more}")

    def unconditional(self) -> Tensor | None:
        return torch.tensor([self.config.classes - 1]) if self.config.unconditional_class else None


def name_of(value: Any) -> str | None:
    """Return the name of a class as a column says it: text or a whole number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


def _distinct(values: Iterable[list[Any]]) -> list[str | None]:
    found = {name_of(value) for shard in values for value in shard}
    return sorted(found, key=lambda name: (name is None, name or ""))[: MOST_CLASSES + 1]


def _in_order(name: str) -> tuple[bool, int, str]:
    """Sort numbers by their value, before text."""
    number = name.isascii() and name.isdecimal()
    return not number, int(name) if number else 0, name
