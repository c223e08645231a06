"""Hold what is cached of the condition of a few samples against what is encoded anew from their pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm_core.networks.autoencoder import FirstStage
from pipelines.conditions.kind import Encoder, Pair
from pipelines.conditions.kinds import kind_of
from pipelines.errors import UserError
from pipelines.shards.format import decode_json, decode_npy
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.inspection.samples import Original, Sample
from pipelines.store.ledger import Artifact

# How far cached states may be from those encoded again here, as a share of their standard deviation. Networks of
# conditions run in fp32: rounding to fp16 and the kernels of another device come to a small part of it, another caption
# or encoder to about 1. Whole numbers, such as tokens, must be the same.
TOLERANCE = 0.05


@dataclass(frozen=True)
class ComparedCondition:
    """A sample whose condition was encoded again.

    Attributes:
        shard, key: which sample.
        file: extension of the file that differs most, and `difference` how far; infinite if it cannot be compared.
    """

    shard: str
    key: str
    file: str
    difference: float

    @property
    def is_wrong(self) -> bool:
        # So that what is not a number is wrong.
        return not self.difference <= TOLERANCE

    def problem(self, kind: str) -> str:
        return (
            f"{self.shard}: {self.file} of sample {self.key} is not what condition {kind} makes of its pair: it "
            f"differs by {self.difference:.2g} of its spread ({TOLERANCE:g} at most): another encoder made it, or it "
            "is of another pair"
        )


def condition_encoder(artifact: Artifact, first_stage: FirstStage) -> Encoder | None:
    """Return what encodes the conditions of an artifact of latents anew, on the CPU; None if it has none.

    Raises:
        UserError: its networks are not there any more, or are others.
    """
    if "condition" not in artifact.manifest.config:
        return None
    kind = kind_of(LatentsConfig.model_validate(artifact.manifest.config).condition)

    def encode_images(images: Tensor) -> Tensor:
        latent: Tensor = first_stage.encode(images).mode()
        return latent

    return kind.encoder(artifact.storage, "cpu", encode_images) if kind.files else None


def compare_condition(encoder: Encoder, sample: Sample, original: Original) -> ComparedCondition:
    """Encode the condition of a sample from its pair, and compare what is cached with it."""
    files = {name: data for name, data in original.files.items() if name != "__key__"}
    pair = Pair(sample.key, decode_json(files["json"]), original.pixels, files)
    try:
        (anew,) = encoder.encode([pair])
    except UserError as error:
        raise UserError(f"the condition of {sample.key} cannot be encoded again: {error}") from error
    differences = {name: _difference(sample.files.get(name), data) for name, data in anew.items()}
    file = max(differences, key=lambda name: (np.nan_to_num(differences[name], nan=np.inf), name))
    return ComparedCondition(sample.shard, sample.key, file, differences[file])


def facts_of(compared: Sequence[ComparedCondition]) -> dict[str, Any]:
    """Return the largest difference as JSON values; none that is not finite, which JSON cannot say."""
    finite = [each for each in compared if np.isfinite(each.difference)]
    if not finite:
        return {}
    worst = max(finite, key=lambda each: each.difference)
    return {
        "tolerance": TOLERANCE,
        "largest_difference": round(worst.difference, 5),
        "largest_shard": worst.shard,
        "largest_key": worst.key,
        "largest_file": worst.file,
    }


def _difference(cached: bytes | None, anew: bytes) -> float:
    """Return the root mean square of the difference of two .npy files, in standard deviations of the second."""
    if cached is None or cached == anew:
        return float("inf") if cached is None else 0.0
    mine, theirs = decode_npy(cached), decode_npy(anew)
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or not np.issubdtype(theirs.dtype, np.floating):
        return float("inf")
    wide: list[NDArray[Any]] = [each.astype(np.float64) for each in (mine, theirs)]
    spread = max(float(wide[1].std()), float(np.finfo(np.float16).tiny))
    return float(np.sqrt(np.mean(np.square(wide[0] - wide[1])))) / spread
