"""Shared memory registered with CUDA, so that the GPU copies from it by itself while the CPU goes on."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from pipelines.notices import tell

_told = False


def pin(memory: Tensor) -> bool:
    """Register memory with CUDA as pinned; tell once, and return False, if it cannot be (the copies then wait).

    Args:
        memory: (bytes,) uint8, whole pages.
    """
    global _told
    runtime = torch.cuda.cudart()
    result = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if result == runtime.cudaError.success:
        return True
    # CUDA keeps the error for whoever asks next, which would be a kernel that has nothing to do with it.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    if not _told:
        _told = True
        tell(f"batches cannot be pinned ({result}; `ulimit -l`?): training goes on, and copies them a little slower")
    return False


def unpin(memory: Tensor) -> None:
    """Take back what `pin` registered; no copy from it may be under way."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
