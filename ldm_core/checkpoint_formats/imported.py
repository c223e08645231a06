"""Result of reading another program's checkpoint."""

from __future__ import annotations

import dataclasses
import math

from ldm_core.configs.model import Config
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.weights.named_tensors import NamedTensors


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model from another program's checkpoint, not yet in memory.

    Attributes:
        kind: what the checkpoint is, in that program's words, for people.
        config: configuration of the model, or of the first stage alone.
        weights: its weights under our names, read one by one.
        tokenizer: the captions' tokenizer, if the model takes captions and one was found.
        left_out: components that are no part of a latent diffusion model, such as a safety checker.
    """

    kind: str
    config: Config
    weights: NamedTensors
    tokenizer: Tokenizer | None = None
    left_out: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.weights.shapes.values())

    def with_tokenizer(self, tokenizer: Tokenizer | None) -> Imported:
        """Return the same model with another tokenizer."""
        return dataclasses.replace(self, tokenizer=tokenizer)
