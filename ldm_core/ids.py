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
