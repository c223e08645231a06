"""Range checks, with a readable error, for ids that index an embedding. Skipped on a GPU, which would synchronise."""

import torch
from torch import Tensor


def check_ids(ids: Tensor, size: int, what: str) -> None:
    """Raise ValueError for ids outside 0 ... size - 1; on a GPU, where this would synchronise, nothing is checked.

    Args:
        ids: integers of any shape.
        size: number of entries in the table.
        what: plural name of the ids, for the message.

    Raises:
        ValueError: an id is out of range; the message names the range found.
    """
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(f"{what} must be in 0 ... {size - 1}, got {low} ... {high}")


def check_tokens(tokens: Tensor, *, max_length: int, vocabulary_size: int | None = None) -> Tensor:
    """Return token ids (B, L) of any integer type as int64, after checking them.

    Args:
        tokens: integers in [0, vocabulary_size), L at most max_length.
        max_length: longest sequence allowed.
        vocabulary_size: number of token ids; None if unknown, which skips their range check.

    Raises:
        ValueError: tokens are not integers of that shape and range.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] > max_length:
        raise ValueError(
            f"tokens must be integers of shape (B, L) with L <= {max_length}, "
            f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    tokens = tokens.long()
    if vocabulary_size is not None:
        check_ids(tokens, vocabulary_size, "token ids")
    return tokens
