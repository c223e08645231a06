"""Ids that are looked up in a table: said plainly where one is not in it."""

import torch
from torch import Tensor


def check_ids(ids: Tensor, size: int, what: str) -> None:
    """Refuse integers outside 0 ... size - 1; on a GPU, which would have to be waited for, nothing is looked at.

    Args:
        ids: integers of any shape.
        size: of the table.
        what: they are, for the message.

    Raises:
        ValueError: names the range found.
    """
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(f"{what} must be in 0 ... {size - 1}, got {low} ... {high}")


def check_tokens(tokens: Tensor, *, max_length: int, vocabulary_size: int | None = None) -> Tensor:
    """Token ids (B, L) of any integer type as int64.

    Args:
        tokens: integers in [0, vocabulary_size), L at most max_length.
        max_length: longest sequence.
        vocabulary_size: None where it is not known.

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
