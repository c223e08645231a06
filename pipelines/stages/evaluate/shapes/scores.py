"""Scores of sampled pictures: how often the detector sees in them what their prompts asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.stages.evaluate.prompts import Prompt
from pipelines.stages.evaluate.shapes.detector import AlignmentReport, alignment

REQUIRED = ("colour", "shape")


def require_expectations(prompts: Sequence[Prompt]) -> None:
    """Refuse, before anything is sampled, prompts that the detector could not judge. Raises UserError."""
    if not any(_judged(prompt) for prompt in prompts):
        raise UserError(
            "evaluate.detector=shapes needs prompts that say what to expect: give a prompts_file .jsonl whose rows "
            f"have {' and '.join(REQUIRED)}"
        )


def alignment_scores(prompts: Sequence[Prompt], images: NDArray[np.uint8]) -> dict[str, Any]:
    """Score the pictures whose prompts say what to expect.

    Args:
        prompts: N prompts.
        images: (N, H, W, 3) uint8, one picture per prompt.

    Returns:
        `accuracy` (colour and shape both right), `samples`, `attributes`, `confusion`, `groups` (for each boolean field
        of the prompts, such as novel_pair: accuracy and samples of the prompts with true, and of those with false) and
        `items`.
    """
    judged = [index for index, prompt in enumerate(prompts) if _judged(prompt)]
    report = alignment([images[index] for index in judged], [prompts[index].expected for index in judged])
    return {
        "accuracy": report.accuracy,
        "samples": report.samples,
        "attributes": report.attributes,
        "confusion": report.confusion,
        "groups": _groups(report),
        "items": [
            {
                "index": index,
                "prompt": prompts[index].text,
                "expected": item.expected,
                "colour": item.detection.colour,
                "shape": item.detection.shape,
                "right": item.right,
            }
            for index, item in zip(judged, report.items, strict=True)
        ],
    }


def _judged(prompt: Prompt) -> bool:
    return all(name in prompt.expected for name in REQUIRED)


def _groups(report: AlignmentReport) -> dict[str, dict[str, dict[str, float]]]:
    names = sorted({n for item in report.items for n, value in item.expected.items() if isinstance(value, bool)})
    return {
        name: {
            str(value).lower(): {"accuracy": float(np.mean(right)), "samples": len(right)}
            for value in (True, False)
            if (right := [item.right for item in report.items if item.expected.get(name) is value])
        }
        for name in names
    }
