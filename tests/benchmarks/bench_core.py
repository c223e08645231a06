"""ldm_core against diffusers, side by side: `python -m tests.benchmarks.bench_core`, or `make bench-core`.

One process, the same weights and inputs, interleaved rounds, medians; both sides in the best shape found for each.
Prints tables, after each part a line of JSON {part, rows}, and as its last line {machine, rows, ratios}. On a GPU the
models are the paper's own (txt2img-1p4b, kl-f8, LDM-1 and LDM-4); on a CPU small ones, but for kl-f8 itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import encoding, network, peers, pixel_latent, prepared, sampling, train_step
from tests.benchmarks.plan import PARTS, Plan, plan_for
from tests.benchmarks.shapes import OURS, Duel, duel
from tests.benchmarks.timing import (
    CPU_THREADS,
    count_flops,
    interleaved,
    is_out_of_memory,
    machine,
    matmul_flops_per_s,
    ratio,
    release_memory,
)

RATIOS = (
    "prepare_vs_eager",
    "train_vs_diffusers",
    "sample_vs_diffusers",
    "encode_vs_diffusers",
    "pixel_vs_latent",
    "matmul_fraction",
)


class Report:
    """Rows as they come: printed as a table, kept for the JSON."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ratios: dict[str, float | None] = dict.fromkeys(RATIOS)
        self._started = time.perf_counter()

    def title(self, text: str) -> None:
        """Print a heading, with the minutes so far."""
        print(f"\n{text}   [{(time.perf_counter() - self._started) / 60:.1f} min]", flush=True)

    def row(self, part: str, name: str, **values: Any) -> None:
        """Print and keep one measurement; numbers have three significant digits."""
        self.rows.append({"part": part, "name": name} | values)
        shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items() if value is not None)
        print(f"  {name:34s} {shown}", flush=True)

    def json(self, part: str) -> None:
        """Print what was measured of a part: all of it is lost to whoever stops the rest, otherwise."""
        print(json.dumps({"part": part, "rows": [row for row in self.rows if row["part"] == part]}), flush=True)

    def duel(self, part: str, result: Duel, images: int, **extra: Any) -> float | None:
        """Print and keep all candidates of a comparison, then its ratio."""
        for stage, timings in (("screening", result.screening), ("final", result.timings)):
            for name, timing in timings.items():
                self.row(
                    part,
                    name,
                    stage=stage,
                    images_per_s=images / timing.median_s,
                    ms=1e3 * timing.median_s,
                    spread=timing.spread,
                    first_call_s=timing.first_call_s,
                    peak_gib=timing.peak_gib,
                    **extra,
                )
        best = ", ".join(result.best.values())
        print(f"  -> best: {best}; ldm / diffusers = {_short(result.ratio)}", flush=True)
        return result.ratio


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts asked for and print their tables and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_core", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models and few rounds: the code paths, not the figures"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument(
        "--batch-sizes", type=lambda text: [int(each) for each in text.split(",")], help="of every part"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.only) - set(PARTS)
    if unknown:
        parser.error(f"--only takes {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    else:
        torch.backends.cudnn.benchmark = True  # for both sides
    peers.be_quiet()
    plan = plan_for(device, quick=options.quick, batch_sizes=options.batch_sizes)
    report = Report()
    for part in options.only:
        report.title(part)
        try:
            PART_FUNCTIONS[part](plan, device, report)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # What has been measured stays, and the other parts may fit.
            report.row(part, "out of memory")
        report.json(part)
        release_memory()
    json.dump({"machine": machine(device), "rows": report.rows, "ratios": report.ratios}, sys.stdout)
    print()


def prepare(plan: Plan, device: torch.device, report: Report) -> None:
    """Measure what `prepare` gains; the ratio is the least of both networks, in training and in sampling."""
    ratios = []
    for recipe in prepared.RECIPES:
        for batch_size in plan.prepare_batch_sizes:
            found = prepared.candidates(prepared.model_of(recipe), batch_size, plan.prepare_steps, device)
            for kind, calls in found.items():
                timings = interleaved(calls, device, rounds=plan.rounds)
                gained = ratio(timings, prepared.PREPARED, prepared.EAGER)
                assert gained is not None
                ratios.append(gained)
                report.row(
                    "prepare",
                    f"{recipe}, {kind}",
                    batch_size=batch_size,
                    ratio=gained,
                    **{f"{name}_ms": 1e3 * timing.median_s for name, timing in timings.items()},
                    spread=max(timing.spread for timing in timings.values()),
                )
    report.ratios["prepare_vs_eager"] = min(ratios)


def train(plan: Plan, device: torch.device, report: Report) -> None:
    """Measure one training step of the UNet; the ratio is that of the batch size at which we gain least."""
    ratios = []
    for batch_size in plan.train_batch_sizes:
        batch = train_step.random_batch(plan.unet, batch_size, 77, device)
        result = duel(train_step.sides(plan.unet, batch, device), device, rounds=plan.rounds)
        ratios.append(report.duel("train", result, batch_size, batch_size=batch_size))
        del result
        release_memory()
        report.ratios["train_vs_diffusers"] = _least(ratios)


def sample(plan: Plan, device: torch.device, report: Report) -> None:
    """Measure captions to images; the ratio is that of the batch size at which we gain least."""
    ratios = []
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    for batch_size in plan.sample_batch_sizes:
        with tempfile.TemporaryDirectory() as folder:
            found = sampling.sides(plan.model, batch_size, plan.sample_steps, device, Path(folder))
            if batch_size == plan.sample_batch_sizes[0]:
                difference = sampling.largest_difference(found)
                report.row("sample", "ours and theirs apart in fp32", at_most=difference)
            result = duel(found, device, rounds=plan.rounds, mode=mode)
        ratios.append(report.duel("sample", result, batch_size, batch_size=batch_size))
        report.row("sample", f"ratio at batch {batch_size}", ratio=ratios[-1])
        release_memory()
        report.ratios["sample_vs_diffusers"] = _least(ratios)


def encode(plan: Plan, device: torch.device, report: Report) -> None:
    """Measure images to latents; the ratio is that of the batch size at which we gain least."""
    first_stage = encoding.initial_first_stage(plan.first_stage, torch.device("meta"))
    side = plan.first_stage.trained_at_resolution
    flops = count_flops(lambda: first_stage.encode(torch.empty(1, 3, side, side, device="meta")))
    ceiling = matmul_flops_per_s(device) if device.type == "cuda" else None
    ratios = []
    for batch_size in plan.encode_batch_sizes:
        result = duel(encoding.sides(plan.first_stage, batch_size, device), device, rounds=plan.rounds)
        ratios.append(report.duel("encode", result, batch_size, batch_size=batch_size))
        report.ratios["encode_vs_diffusers"] = _least(ratios)
        per_s = flops * batch_size / result.timings[result.best[OURS]].median_s
        fraction = per_s / ceiling if ceiling else None
        report.row("encode", "ours", gflop_per_image=flops / 1e9, tflop_per_s=per_s / 1e12, matmul_fraction=fraction)
        del result
        release_memory()


def pixel(plan: Plan, device: torch.device, report: Report) -> None:
    """Measure training throughput at f=1 and at f=4."""
    timings, parameters = pixel_latent.throughput(
        plan.pixel_latent, plan.pixel_latent_batch_sizes, device, rounds=plan.rounds
    )
    per_s = {name: plan.pixel_latent_batch_sizes[name] / timing.median_s for name, timing in timings.items()}
    for name, timing in timings.items():
        report.row(
            "pixel",
            name,
            batch_size=plan.pixel_latent_batch_sizes[name],
            parameters_m=parameters[name] / 1e6,
            images_per_s=per_s[name],
            spread=timing.spread,
            peak_gib=timing.peak_gib,
        )
    report.ratios["pixel_vs_latent"] = per_s[pixel_latent.LATENTS] / per_s[pixel_latent.PIXELS]


def sweep(plan: Plan, device: torch.device, report: Report) -> None:
    """Measure the whole network by batch size, and its share of what a matrix product reaches."""
    flops = network.training_flops(plan.model)
    report.row("sweep", "FLOPs an image", **{f"{part}_gflop": count / 1e9 for part, count in flops.items()})
    ceiling = matmul_flops_per_s(device) if device.type == "cuda" else None
    if ceiling:
        report.row("sweep", "bf16 matrix product 8192^3", tflop_per_s=ceiling / 1e12)

    def show(run: network.NetworkRun) -> None:
        per_s = run.batch_size / run.timing.median_s if run.timing else None
        report.row(
            "sweep",
            f"batch {run.batch_size}{' checkpointed' if run.activation_checkpointing else ''}",
            images_per_s=per_s,
            matmul_fraction=per_s * flops["train"] / ceiling if per_s and ceiling else None,
            spread=run.timing.spread if run.timing else None,
            first_call_s=run.timing.first_call_s if run.timing else None,
            peak_gib=run.timing.peak_gib if run.timing else None,
            note=None if run.timing else "out of memory",
        )

    network.sweep(plan.model, plan.sweep_batch_sizes, device, rounds=plan.rounds, report=show)
    fractions = [row["matmul_fraction"] for row in report.rows if row["part"] == "sweep" and row.get("matmul_fraction")]
    report.ratios["matmul_fraction"] = max(fractions, default=None)


PART_FUNCTIONS = dict(zip(PARTS, (prepare, train, sample, encode, pixel, sweep), strict=True))


def _least(ratios: Sequence[float | None]) -> float | None:
    return min((each for each in ratios if each is not None), default=None)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
