"""How many tokens the captions of a sample have, from what is cached of them. Imported without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipelines.shards.format import decode_npy

# Of one sample, for each encoder the tokens of each caption.
Lengths = dict[str, list[int]]


def token_lengths(files: Mapping[str, bytes], details: Mapping[str, Any]) -> Lengths:
    """Return the lengths of a sample's captions, special tokens included; nothing for a condition without captions.

    Args:
        files: the cached files of the sample, by extension.
        details: those of the latents' manifest.
    """
    kind = details.get("condition", {}).get("kind")
    return _KINDS[kind](files, details) if kind in _KINDS else {}


def _of_tokens(files: Mapping[str, bytes], details: Mapping[str, Any]) -> Lengths:
    # Padding is what follows the last token: a caption may name the token for it.
    shown = decode_npy(files["tokens.npy"]) != details["pad_id"]
    ends = shown.shape[1] - np.argmax(shown[:, ::-1], axis=1)
    return {"text": np.where(shown.any(axis=1), ends, 0).tolist()}


def _of_states(files: Mapping[str, bytes], details: Mapping[str, Any]) -> Lengths:
    ending = "_lengths.npy"
    return {name.removesuffix(ending): decode_npy(files[name]).tolist() for name in sorted(files) if ending in name}


_KINDS: Mapping[str, Callable[[Mapping[str, bytes], Mapping[str, Any]], Lengths]] = {
    "text": _of_tokens,
    "frozen_text": _of_states,
}
