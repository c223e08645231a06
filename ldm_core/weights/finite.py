"""Find weights that hold NaN or infinity, by name, before they spoil a run."""

from __future__ import annotations

import torch
from torch import nn

NAMED_AT_MOST = 5


def check_finite(module: nn.Module) -> None:
    """Raise ValueError for a module with a weight or buffer that is not finite; meta tensors are skipped.

    Args:
        module: any module; its floating-point parameters and buffers are read once.

    Raises:
        ValueError: a tensor holds NaN or infinity; names the first few of these.
    """
    tensors = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point() and not tensor.is_meta
    }
    with torch.no_grad():
        # One scalar per tensor, all read together, so that a GPU synchronises once. NaN and infinity make a sum so, in
        # one pass over the weights; large numbers may overflow it, so that only a sum that is finite says something.
        sums = [tensor.sum().isfinite() for tensor in tensors.values()]
        fine = torch.stack(sums).tolist() if sums else []
        suspects = [name for name, each in zip(tensors, fine, strict=True) if not each]
        wrong = [name for name in suspects if not tensors[name].isfinite().all()]
    if wrong:
        shown = ", ".join(wrong[:NAMED_AT_MOST]) + (", ..." if len(wrong) > NAMED_AT_MOST else "")
        raise ValueError(
            f"weights must be finite, {len(wrong)} of {len(tensors)} tensors hold NaN or infinity ({shown}): "
            "the checkpoint is damaged or its training diverged; take an earlier one"
        )
