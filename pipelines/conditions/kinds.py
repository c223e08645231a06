"""The kinds of conditions there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm_core import checkpoint
from ldm_core.configs.conditioning import ClassConfig, conditioner_kind
from ldm_core.configs.model import LatentDiffusionConfig, takes_captions
from pipelines.conditions.class_labels import ClassLabels, ClassPrompts
from pipelines.conditions.config import Condition
from pipelines.conditions.frozen_text import FrozenText
from pipelines.conditions.kind import Kind, Prompts
from pipelines.conditions.layout import layout
from pipelines.conditions.low_resolution import low_resolution
from pipelines.conditions.masked_image import masked_image
from pipelines.conditions.none import NoPrompts, Unconditional
from pipelines.conditions.semantic_map import semantic_map
from pipelines.conditions.text import CaptionPrompts, Text

KINDS: Mapping[str, Callable[[Any], Kind]] = {
    "none": Unconditional,
    "text": Text,
    "frozen_text": FrozenText,
    "class": ClassLabels,
    "layout": layout,
    "semantic_map": semantic_map,
    "low_resolution": low_resolution,
    "masked_image": masked_image,
}


def kind_of(condition: Condition) -> Kind:
    """Return the kind of a recipe's condition."""
    return KINDS[condition.kind](condition)


def prompts_in(folder: Path, config: LatentDiffusionConfig) -> Prompts:
    """Return what makes a finished model's inputs from prompts, whoever trained it.

    Args:
        folder: the model's, with its tokenizer if it takes captions.
        config: the model's configuration.

    Raises:
        ValueError, FileNotFoundError: the model cannot be asked by prompts, or its tokenizer is missing or damaged.
    """
    match config.conditioner:
        case None:
            return NoPrompts()
        case ClassConfig() as classes:
            return ClassPrompts(classes)
    if takes_captions(config):
        # However its text encoder came about, its tokenizer lies beside its weights.
        return CaptionPrompts(checkpoint.load_tokenizer(folder))
    raise ValueError(
        f"a model conditioned on {conditioner_kind(config.conditioner)} takes no prompts: use ldm_core in Python"
    )
