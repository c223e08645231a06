"""Conditions in training: from what is cached of a sample to the arrays of a batch, and to the network's input.

Torch is not imported here: these classes work in the loader's processes, which must start quickly and stay small.

Shapes: B is the batch; L the length of a condition, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.format import decode_npy

if TYPE_CHECKING:
    from torch import Tensor

    from ldm_core.conditioning import Conditioning, Shared

# The rows that a text transformer encodes are filled up to sixteenths of a batch: it is compiled for each number.
ROW_STEPS = 16

# What is cached of one sample, decoded.
Cached = tuple[NDArray[Any], ...]
Arrays = dict[str, NDArray[Any]]


class Examples(Protocol):
    """Makes the network's input from what is cached, in training.

    All but `inputs` is called in the loader's processes, so that it must be picklable.
    """

    def decode(self, files: Mapping[str, bytes]) -> Cached:
        """Decode the cached files of a sample, by extension, to arrays."""
        ...

    def draw(self, cached: Cached, chance: float) -> NDArray[Any]:
        """Return the condition of one sample in one epoch: one of its captions, for example.

        Args:
            cached: what `decode` returned.
            chance: drawn uniformly from [0, 1), by which one of several is chosen.
        """
        ...

    def batch(self, drawn: Sequence[NDArray[Any]], uniform: NDArray[np.float64]) -> Arrays:
        """Return the arrays of a batch of B samples, some of them dropped for classifier-free guidance.

        Args:
            drawn: what `draw` returned, one a sample.
            uniform: (B,) numbers drawn uniformly from [0, 1), which decide about what is dropped.
        """
        ...

    def inputs(self, batch: Mapping[str, Tensor]) -> Any:
        """Return what the network takes, from a batch on the device."""
        ...


class NoExamples:
    """Nothing, for models without a condition."""

    def decode(self, files: Mapping[str, bytes]) -> Cached:
        return ()

    def draw(self, cached: Cached, chance: float) -> NDArray[Any]:
        return np.empty(0)

    def batch(self, drawn: Sequence[NDArray[Any]], uniform: NDArray[np.float64]) -> Arrays:
        return {}

    def inputs(self, batch: Mapping[str, Tensor]) -> None:
        return None


class CaptionExamples:
    """Draws one of a picture's captions.

    Args:
        file: extension of the (captions, L) token ids.
        empty_tokens: (L,) ids of the empty caption, which guidance needs (Ho & Salimans 2021).
        dropout: share of captions that are replaced by it.
    """

    def __init__(self, file: str, empty_tokens: Sequence[int], dropout: float) -> None:
        self.file, self.empty_tokens, self.dropout = file, np.array(empty_tokens, np.int64), dropout

    def decode(self, files: Mapping[str, bytes]) -> Cached:
        return (decode_npy(files[self.file]),)

    def draw(self, cached: Cached, chance: float) -> NDArray[Any]:
        captions = cached[0]
        return captions[int(chance * len(captions))]

    def batch(self, drawn: Sequence[NDArray[Any]], uniform: NDArray[np.float64]) -> Arrays:
        tokens = np.stack(drawn).astype(np.int64)
        tokens[uniform < self.dropout] = self.empty_tokens
        # The empty caption and others that come more than once are encoded once.
        _, first, caption = np.unique(tokens, axis=0, return_index=True, return_inverse=True)
        step = -(-len(tokens) // ROW_STEPS)
        first = np.pad(first, (0, -len(first) % step), mode="edge")
        return {"tokens": tokens, "distinct": first.astype(np.int64), "caption": caption.reshape(-1).astype(np.int64)}

    def inputs(self, batch: Mapping[str, Tensor]) -> Shared:
        # Only in the process that trains: see above.
        from ldm_core.conditioning import Shared

        return Shared(inputs=batch["tokens"][batch["distinct"]], row=batch["caption"])


class ClassExamples:
    """Labels of a batch; one more than there are classes stands for "no class" (Ho & Salimans 2021).

    Args:
        file: extension of the scalar with the class's number.
        classes: how many there are.
        dropout: share of labels that are replaced by "no class".
    """

    def __init__(self, file: str, classes: int, dropout: float) -> None:
        self.file, self.no_class, self.dropout = file, classes, dropout

    def decode(self, files: Mapping[str, bytes]) -> Cached:
        return (decode_npy(files[self.file]),)

    def draw(self, cached: Cached, chance: float) -> NDArray[Any]:
        return cached[0]

    def batch(self, drawn: Sequence[NDArray[Any]], uniform: NDArray[np.float64]) -> Arrays:
        labels = np.stack(drawn).astype(np.int64)
        labels[uniform < self.dropout] = self.no_class
        return {"labels": labels}

    def inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["labels"]


class CaptionStateExamples:
    """Draws the states of one of a picture's captions, filled up to one length; those of two encoders side by side.

    Args:
        files: extensions of the states and of their lengths, of one encoder after the other.
        null: (n, D) states of the empty caption, which guidance needs (Ho & Salimans 2021); D is the sum of the widths.
        length: L, the longest that a caption can be.
        masked: whether the UNet does not attend to what is filled up.
        dropout: share of captions that are replaced by the empty one.
    """

    def __init__(
        self, files: tuple[str, ...], null: NDArray[np.float16], length: int, *, masked: bool, dropout: float
    ) -> None:
        self.files, self.length, self.masked, self.dropout = files, length, masked, dropout
        self.null = null

    def decode(self, files: Mapping[str, bytes]) -> Cached:
        return tuple(decode_npy(files[name]) for name in self.files)

    def draw(self, cached: Cached, chance: float) -> NDArray[Any]:
        # Of all encoders the same caption.
        number = int(chance * len(cached[1]))
        files = zip(cached[::2], cached[1::2], strict=True)
        return joined_states([_of_caption(states, lengths, number) for states, lengths in files])

    def batch(self, drawn: Sequence[NDArray[Any]], uniform: NDArray[np.float64]) -> Arrays:
        """Return (B, L, D) states and, if it is needed, (B, L) which of them are real."""
        context = np.zeros((len(drawn), self.length, drawn[0].shape[1]), np.float16)
        mask = np.zeros(context.shape[:2], bool)
        for row, (states, dropped) in enumerate(zip(drawn, uniform < self.dropout, strict=True)):
            shown = self.null if dropped else states
            context[row, : len(shown)] = shown
            mask[row, : len(shown)] = True
        return {"context": context} | ({"mask": mask} if self.masked else {})

    def inputs(self, batch: Mapping[str, Tensor]) -> Conditioning:
        # Only in the process that trains: see above.
        from ldm_core.conditioning import Conditioning

        return Conditioning(context=batch["context"].float(), mask=batch.get("mask"))


def _of_caption(states: NDArray[Any], lengths: NDArray[Any], number: int) -> NDArray[Any]:
    end = int(lengths[: number + 1].sum())
    return states[end - int(lengths[number]) : end]


def joined_states(of_encoders: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the (n, D) states of a caption by each encoder side by side, zeros after the last of each."""
    if len(of_encoders) == 1:
        return of_encoders[0]
    longest = max(len(states) for states in of_encoders)
    return np.concatenate([np.pad(each, ((0, longest - len(each)), (0, 0))) for each in of_encoders], axis=1)
