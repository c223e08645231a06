"""The tokenizers of a model with several text encoders, as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ldm_core.tokenizers.tokenizer import Tokenizer


class JoinedTokenizer:
    """Token ids of each caption by several tokenizers, all of one length.

    Args:
        tokenizers: one for each encoder, in their order.

    Raises:
        ValueError: they cut captions to different lengths.
    """

    def __init__(self, tokenizers: Sequence[Tokenizer]) -> None:
        if len(lengths := {tokenizer.max_length for tokenizer in tokenizers}) != 1:
            raise ValueError(f"tokenizers of one model must cut captions to one length, got {sorted(lengths)}")
        self.tokenizers = tuple(tokenizers)

    @property
    def max_length(self) -> int:
        """Number of tokens that a caption is cut or padded to."""
        return self.tokenizers[0].max_length

    def encode(self, captions: Sequence[str]) -> npt.NDArray[np.uint16]:
        """Return the ids of N captions, (N, tokenizers, max_length). Raises TypeError for one string."""
        return np.stack([tokenizer.encode(captions) for tokenizer in self.tokenizers], axis=1)


AnyTokenizer = Tokenizer | JoinedTokenizer
