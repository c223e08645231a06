"""The choices a user has on either side (precision, memory format, compilation), and the search for the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.benchmarks.timing import Timing, interleaved, ratio, release_memory

OURS, THEIRS = "ldm", "diffusers"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """How a network is run.

    Attributes:
        precision: "bf16" is autocast in training, and weights cast once for inference.
        channels_last: memory format of weights and inputs.
        compiled: through `torch.compile`, in place.
        mode: of `torch.compile`.
    """

    precision: Literal["fp32", "bf16"]
    channels_last: bool
    compiled: bool = False
    mode: str = "default"

    def __str__(self) -> str:
        return f"{self.precision} {'nhwc' if self.channels_last else 'nchw'} {'compiled' if self.compiled else 'eager'}"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs in inference."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the region around a training step's forward pass."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def for_training(self, module: nn.Module) -> None:
        """Set memory format, then compile; the weights stay float32."""
        module.to(memory_format=self._format)
        self._compile(module)

    def for_inference(self, module: nn.Module) -> None:
        """Set precision and memory format, then compile."""
        module.eval().requires_grad_(False).to(self.dtype).to(memory_format=self._format)
        self._compile(module)

    def input(self, x: Tensor, *, cast: bool) -> Tensor:
        """Return x in the memory format of the weights and, with `cast`, in their precision."""
        return (x.to(self.dtype) if cast else x).contiguous(memory_format=self._format)

    @property
    def _format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _compile(self, module: nn.Module) -> None:
        if self.compiled:
            module.compile(dynamic=False, mode=None if self.mode == "default" else self.mode)


@dataclass(frozen=True)
class Duel:
    """The outcome of one comparison: every candidate's timing, and each side's best."""

    timings: dict[str, Timing]
    shapes: dict[str, Shape]
    best: dict[str, str]
    screening: dict[str, Timing]

    @property
    def ratio(self) -> float | None:
        """How many times faster our best is than theirs; None without them."""
        if THEIRS not in self.best:
            return None
        return ratio(self.timings, self.best[OURS], self.best[THEIRS])


def duel(
    sides: Mapping[str, Callable[[Shape], Call]], device: torch.device, *, rounds: int, mode: str = "default"
) -> Duel:
    """Let each side run in its best shape, then time the two against each other.

    On a GPU both run in bf16, channels_last and compiled. On a CPU no shape is best everywhere: each side is timed
    eagerly in all four, its best one is compiled too, and the better of these two stands for it.

    Args:
        sides: for each side, a function that prepares a fresh copy of its network in a shape, and returns the call.
        device: where they run.
        rounds: timed rounds of the final.
        mode: of `torch.compile`.
    """
    screening: dict[str, Timing] = {}
    finalists = {side: [Shape("bf16", True, True, mode)] for side in sides}
    if device.type == "cpu":
        eager = [Shape(precision, last) for precision in ("fp32", "bf16") for last in (False, True)]
        calls = {f"{side} {shape}": prepare(shape) for side, prepare in sides.items() for shape in eager}
        screening = interleaved(calls, device, rounds=2, warmup=1)
        del calls
        for side in sides:
            fastest = min(eager, key=lambda shape: screening[f"{side} {shape}"].median_s)
            finalists[side] = [fastest, replace(fastest, compiled=True, mode=mode)]
        release_memory()
    shapes = {f"{side} {shape}": shape for side, found in finalists.items() for shape in found}
    calls = {f"{side} {shape}": sides[side](shape) for side, found in finalists.items() for shape in found}
    timings = interleaved(calls, device, rounds=rounds)
    best = {
        side: min((f"{side} {shape}" for shape in found), key=lambda name: timings[name].median_s)
        for side, found in finalists.items()
    }
    return Duel(timings, shapes, best, screening)
