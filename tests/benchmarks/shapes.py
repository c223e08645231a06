"""The choices a user has on either side (precision, memory format, compilation), and the search for the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ldm_core.prepare import Precision, Prepared, Purpose, prepare
from tests.benchmarks.timing import Timing, allocated_bytes, interleaved, ratio, release_memory

OURS, THEIRS = "ldm", "diffusers"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """How a network is run. Ours is run as `prepare` runs it, which decides about the memory format itself.

    Attributes:
        precision: "bf16" is autocast in training, and weights cast once for inference.
        channels_last: memory format of weights and inputs.
        compiled: through `torch.compile`, in place.
        mode: of `torch.compile`.
    """

    precision: Precision
    channels_last: bool
    compiled: bool = False
    mode: str = "default"

    def __str__(self) -> str:
        return f"{self.precision} {'nhwc' if self.channels_last else 'nchw'} {'compiled' if self.compiled else 'eager'}"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs in inference."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def prepare(self, network: nn.Module, purpose: Purpose) -> Prepared:
        """Prepare a network of ours."""
        return prepare(network, for_=purpose, precision=self.precision, compile=self.compiled)

    def train_theirs(self, network: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
        """Set the memory format of diffusers' network, then compile it whole; return what goes around its forward."""
        network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.compile_theirs(network)
        device = next(network.parameters()).device
        return lambda: torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def infer_theirs(self, network: nn.Module) -> None:
        """Set precision and memory format of a network of diffusers'."""
        network.eval().requires_grad_(False).to(self.dtype).to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def compile_theirs(self, network: nn.Module) -> None:
        """Compile a network of diffusers' whole, which leaves the most to fuse."""
        if self.compiled:
            network.compile(dynamic=False, mode=None if self.mode == "default" else self.mode)

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and inputs."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


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
    eagerly in both precisions, diffusers in both memory formats, the best one is compiled too, and the better of these
    two stands for it.

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
        calls = {f"{side} {shape}": build(shape) for side, build in sides.items() for shape in _tried(side, eager)}
        screening = interleaved(calls, device, rounds=2, warmup=1)
        del calls
        for side in sides:
            fastest = min(_tried(side, eager), key=lambda shape: screening[f"{side} {shape}"].median_s)
            finalists[side] = [fastest, replace(fastest, compiled=True, mode=mode)]
        release_memory()
    shapes = {f"{side} {shape}": shape for side, found in finalists.items() for shape in found}
    calls, held = {}, {}
    for side, found in finalists.items():
        for shape in found:
            before = allocated_bytes(device)
            call = calls[f"{side} {shape}"] = sides[side](shape)
            if device.type == "cuda":
                # An optimizer allocates at its first step, and so do compiled graphs.
                call()
            held[f"{side} {shape}"] = allocated_bytes(device) - before
    timings = interleaved(calls, device, rounds=rounds, held_bytes=held)
    best = {
        side: min((f"{side} {shape}" for shape in found), key=lambda name: timings[name].median_s)
        for side, found in finalists.items()
    }
    return Duel(timings, shapes, best, screening)


def _tried(side: str, shapes: Sequence[Shape]) -> list[Shape]:
    """Return the shapes that a side has on a CPU: `prepare` leaves the memory format as it is there."""
    return [shape for shape in shapes if side != OURS or not shape.channels_last]
