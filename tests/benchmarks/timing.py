"""Measuring: interleaved repeats, medians, machine facts, and the ceiling that a large matrix product reaches."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

SHORTEST_ROUND_S = 0.25
CPU_THREADS = 1
_OUT_OF_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "unable to find an engine",
    "NOT_INITIALIZED",
    "can't allocate memory",
)


@dataclass(frozen=True)
class Timing:
    """How long one candidate took.

    Attributes:
        seconds: every round's time for one call; on a CPU that of its one thread, which is what other processes on the
            machine disturb least.
        first_call_s: wall time of the first call, compilation included.
        peak_gib: most memory that it had allocated on the GPU during the rounds; None on the CPU.
    """

    seconds: tuple[float, ...]
    first_call_s: float
    peak_gib: float | None = None

    @property
    def median_s(self) -> float:
        """Median time of one call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median_s
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median_s


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 2,
    held_bytes: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Timing]:
    """Time candidates in turn, A B A B ..., so that whatever else the machine does meets all of them alike.

    Args:
        candidates: what to time, by name.
        device: where they run.
        rounds: timed rounds of each; a round is as many calls as last a quarter of a second.
        warmup: calls after the first one that are not timed.
        held_bytes: what a candidate keeps on the GPU between calls; without it, all that is kept there counts as its
            own.
    """
    first_s, calls = {}, {}
    for name, call in candidates.items():
        first_s[name] = _timed(call, 1, device, clock=time.perf_counter)
        last_s = min(_timed(call, 1, device) for _ in range(max(1, warmup)))
        calls[name] = max(1, round(SHORTEST_ROUND_S / last_s))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    peak: dict[str, float] = dict.fromkeys(candidates, 0.0)
    for _ in range(rounds):
        for name, call in candidates.items():
            before = allocated_bytes(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds[name].append(_timed(call, calls[name], device))
            if device.type == "cuda":
                passing = torch.cuda.max_memory_allocated(device) - before
                peak[name] = max(peak[name], (held_bytes.get(name, before) + passing) / 2**30)
    return {
        name: Timing(tuple(seconds[name]), first_s[name], peak[name] if device.type == "cuda" else None)
        for name in candidates
    }


def allocated_bytes(device: torch.device) -> int:
    """Return what torch has allocated on a GPU; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def ratio(timings: Mapping[str, Timing], ours: str, theirs: str) -> float | None:
    """Return how many times faster ours is: the median over rounds of theirs / ours; None if one was not run."""
    if ours not in timings or theirs not in timings:
        return None
    pairs = zip(timings[ours].seconds, timings[theirs].seconds, strict=True)
    return statistics.median(other / own for own, other in pairs)


def release_memory() -> None:
    """Give back what the last measurement held, compiled graphs included."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether memory did not suffice, which torch's allocator says, and near its limit cuBLAS and cuDNN too."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def matmul_flops_per_s(device: torch.device, *, side: int = 8192, rounds: int = 20) -> float:
    """Measure FLOP/s of a square bf16 matrix product on random data: the ceiling of everything else on this card."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    timing = interleaved({"matmul": lambda: left @ right}, device, rounds=rounds, warmup=5)["matmul"]
    return 2 * side**3 / timing.median_s


def count_flops(call: Callable[[], object]) -> int:
    """Count FLOPs of the matrix products, convolutions and attention in a call (a multiply-add counts two)."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def machine(device: torch.device) -> dict[str, Any]:
    """Return what was measured on."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        facts["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return facts


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _timed(
    call: Callable[[], object], calls: int, device: torch.device, clock: Callable[[], float] | None = None
) -> float:
    clock = clock or (time.process_time if device.type == "cpu" else time.perf_counter)
    synchronize(device)
    start = clock()
    for _ in range(calls):
        call()
    synchronize(device)
    return (clock() - start) / calls
