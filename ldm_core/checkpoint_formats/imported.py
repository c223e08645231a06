"""What reading another program's checkpoint gives."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.weights.named_tensors import NamedTensors

if TYPE_CHECKING:
    from ldm_core.checkpoint import AnyTokenizer

Config = LatentDiffusionConfig | FirstStageConfig


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model of another program's, not yet in memory.

    Attributes:
        kind: what it was there, for people.
        config: of the model, or of the first stage alone.
        weights: under our names, read one by one.
        tokenizer: of the captions, where it is a model of captions and one was found.
        left_out: parts that are no part of a latent diffusion model, such as a safety checker.
    """

    kind: str
    config: Config
    weights: NamedTensors
    tokenizer: AnyTokenizer | None = None
    left_out: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.weights.shapes.values())

    def with_tokenizer(self, tokenizer: AnyTokenizer | None) -> Imported:
        """The same with another tokenizer."""
        return dataclasses.replace(self, tokenizer=tokenizer)
