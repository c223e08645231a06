"""Exponential moving average of a network's weights, kept in float32 outside the graph.

The paper samples from averaged weights; decay and warm-up follow its code release.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """The average of every floating-point parameter and buffer of a module.

    Args:
        module: the network being trained, unwrapped and on its final device; `update` reads and `swapped` writes
            the tensors that it holds now.
        decay: share of the old average that an update keeps.
        warmup: keep less at the beginning, min(decay, (1 + n) / (10 + n)) at the n-th update.

    Attributes:
        shadow: averages by the names of the module's state dict, float32 on the module's device.
        num_updates: number of updates so far.

    Raises:
        ValueError: unless 0 <= decay < 1, or if the module has nothing to average.
    """

    def __init__(self, module: nn.Module, *, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self._module = module
        self._source = _floating_tensors(module)
        if not self._source:
            raise ValueError("EMA averages floating-point weights, this module has none")
        self.shadow: dict[str, Tensor] = {
            name: tensor.detach().to(torch.float32, copy=True) for name, tensor in self._source.items()
        }
        # The fused update needs one dtype. Other weights are widened into these buffers first, by one fused copy.
        self._widened = {
            name: torch.empty_like(self.shadow[name])
            for name, tensor in self._source.items()
            if tensor.dtype != torch.float32
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's current weights; call after each optimizer step.

        Raises:
            ValueError: if the module's weights were replaced by other tensors (`load_state_dict(..., assign=True)`).
        """
        self._check_source()
        self.num_updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        if self._widened:
            torch._foreach_copy_(list(self._widened.values()), [self._source[name] for name in self._widened])
        weights = [self._widened.get(name, tensor) for name, tensor in self._source.items()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the module compute with the average inside the context; afterwards its own weights are back."""
        self._check_source()
        own = {name: tensor.detach().clone() for name, tensor in self._source.items()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` continues from: {"num_updates": int, "shadow": {name: float32 tensor}}."""
        return {"num_updates": self.num_updates, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict()` returned.

        Raises:
            ValueError: if names or shapes are not this module's.
        """
        saved: dict[str, Tensor] = state["shadow"]
        wrong = sorted(saved.keys() ^ self.shadow.keys())
        wrong += sorted(k for k in saved.keys() & self.shadow.keys() if saved[k].shape != self.shadow[k].shape)
        if wrong:
            raise ValueError(
                f"the saved EMA must hold this network's tensors, {len(wrong)} differ in name or shape "
                f"({', '.join(wrong[:5])}): build the network from the checkpoint's own config"
            )
        self.num_updates = int(state["num_updates"])
        for name, average in self.shadow.items():
            average.copy_(saved[name])

    def _check_source(self) -> None:
        # One tensor stands for all, because weights are replaced together or not at all.
        name, tensor = next(iter(self._source.items()))
        path, _, last = name.rpartition(".")
        if getattr(self._module.get_submodule(path), last) is not tensor:
            raise ValueError(
                f"the averaged module now holds other tensors ({name}): make a new EMA after assigning weights"
            )

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        # Copied into the module's own storage: compiled graphs, optimizers and DDP hold on to these tensors.
        torch._foreach_copy_(list(self._source.values()), [values[name] for name in self._source])


def _floating_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's floating-point parameters and buffers themselves, so that a change of layout is seen."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
