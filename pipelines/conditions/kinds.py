"""The kinds of conditions there are, by name."""

from __future__ import annotations

from collections.abc import Mapping

from ldm_core.configs.conditioning import conditioner_kind
from ldm_core.configs.model import LatentDiffusionConfig, takes_captions
from pipelines.conditions.class_labels import ClassLabels
from pipelines.conditions.config import Condition
from pipelines.conditions.frozen_text import FrozenText
from pipelines.conditions.kind import Kind
from pipelines.conditions.none import Unconditional
from pipelines.conditions.text import Text

KINDS: Mapping[str, type[Kind]] = {
    "none": Unconditional,
    "text": Text,
    "frozen_text": FrozenText,
    "class": ClassLabels,
}


def kind_of(condition: Condition) -> Kind:
    """Return the kind of a recipe's condition."""
    return KINDS[condition.kind](condition)


def kind_of_model(config: LatentDiffusionConfig) -> type[Kind]:
    """Return the kind of condition that a model takes, whoever trained it.

    Raises:
        ValueError: this project cannot sample it by prompts.
    """
    name = "none" if config.conditioner is None else conditioner_kind(config.conditioner)
    if takes_captions(config):
        # However its text encoder came about, its tokenizer lies beside its weights.
        return Text
    if name not in KINDS:
        raise ValueError(f"a model conditioned on {name} cannot be sampled from prompts: use ldm_core in Python")
    return KINDS[name]
