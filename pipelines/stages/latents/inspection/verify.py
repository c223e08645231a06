"""Hold a few cached latents against the pictures that they were made from, and against the first stage, run anew.

x: (1, 3, H, W) pictures in [-1, 1]; moments: (2 or 1, C, h, w), as cached
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm_core.images import to_unit_range
from ldm_core.metrics import psnr
from ldm_core.networks.autoencoder import FirstStage
from pipelines.errors import UserError
from pipelines.stage import Verification
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.latents.config import ViewsConfig
from pipelines.stages.latents.encoding.names import latent_file
from pipelines.stages.latents.encoding.views import draw_view
from pipelines.stages.latents.inspection.conditions import (
    ComparedCondition,
    compare_condition,
    condition_encoder,
    facts_of,
)
from pipelines.stages.latents.inspection.samples import (
    Original,
    Sample,
    choose,
    gone,
    originals,
    read_index,
    read_samples,
)
from pipelines.store.ledger import Artifact

# How far cached moments may be from those encoded again here, as a share of their standard deviation. Rounding to fp16
# and the kernels of another device (TF32 among them) come to a small part of these, another picture or encoder to 1.
TOLERANCES = {"fp32": 0.05, "bf16": 0.2}
# A channel that hardly varies is rounded as coarsely as its values are large.
LEAST_SPREAD = 0.05
# How much further from its picture a cached latent may decode than the first stage's own reconstruction, and from which
# PSNR on a difference cannot be seen.
LOSS_DB = 3.0
INDISTINGUISHABLE_DB = 40.0
# Of equal pictures the PSNR is infinite, which JSON cannot say.
MOST_DB = 100.0


def verify(artifact: Artifact, most: int) -> Verification:
    """Encode up to `most` samples again and decode them, as far as pairs and first stage are still there.

    Of latents with views each sample's first view is looked at, and one more, another from sample to sample. What is
    cached of the condition is encoded again, too, if its networks are still there.

    The first stage runs on the CPU in fp32, a picture at a time: it knows no statistics of a batch, so that where the
    batches were cut does not matter beyond the last bits.

    Raises:
        UserError: an artifact is damaged, or of a format that this code does not read.
    """
    chosen = choose(artifact, most, shards=most)
    if not chosen:
        return Verification()
    autoencoder, pairs = artifact.upstream("autoencoder"), artifact.upstream("pairs")
    if autoencoder is None:
        return Verification(notes=[f"not compared with the pictures: {gone(artifact, 'autoencoder')}"])
    made_by, found = (each.details.get("encoder_sha256", "") for each in (artifact, autoencoder))
    if made_by and made_by != found:
        problem = f"made by encoder {made_by[:12]}, but autoencoder {autoencoder.key} holds {found[:12]}"
        return Verification(problems=[f"{artifact.key}: {problem}"])
    first_stage = load_first_stage(autoencoder)
    samples = (read_samples(artifact.storage, record, read_index(artifact.storage, record), n) for record, n in chosen)
    if pairs is None:
        return _decoded_alone(first_stage, samples, gone(artifact, "pairs"))
    result, views = Verification(), _views(artifact)
    compared: list[_Compared] = []
    conditions: list[ComparedCondition] = []
    count = 0
    try:
        encoder = condition_encoder(artifact, first_stage)
    except UserError as error:
        encoder = None
        result.notes.append(f"what is cached of the condition is not compared: {error}")
    for of_shard in samples:
        shard = of_shard[0].shard
        try:
            pictures = originals(pairs, shard, [sample.key for sample in of_shard])
        except UserError as error:
            result.notes.append(f"{shard}: not compared with its pictures: {error}")
            continue
        if strange := [sample.key for sample in of_shard if sample.key not in pictures]:
            result.problems.append(f"{shard}: sample {strange[0]} is not in that shard of pairs {pairs.key}")
        for sample in of_shard:
            if (original := pictures.get(sample.key)) is None:
                continue
            if original.files["json"] != sample.facts:
                result.problems.append(f"{shard}: the json of sample {sample.key} is not that of its pair")
            for view in [0, 1 + count % (views.count - 1)] if views else [0]:
                if latent_file(view) in sample.files:
                    compared.append(_compare(first_stage, sample, original, view, views))
                else:
                    result.problems.append(f"{shard}: sample {sample.key} has no {latent_file(view)}")
            count += 1
            if encoder is not None:
                conditions.append(compare_condition(encoder, sample, original))
    if not compared:
        return result
    tolerance = TOLERANCES[artifact.manifest.config.get("precision", "fp32")]
    differences = _differences(compared)
    result.problems.extend(_problems(compared, differences, tolerance, autoencoder.key))
    worst = int(np.argmax(differences))
    result.facts.update(
        {
            "samples": count,
            "latents": len(compared),
            "pairs": pairs.key,
            "autoencoder": autoencoder.key,
            "psnr_db": _median_and_worst(compared, [each.cached_db for each in compared]),
            "reconstruction_psnr_db": _median_and_worst(compared, [each.own_db for each in compared]),
            "encoded_again": {
                "tolerance": tolerance,
                "largest_difference": round(differences[worst], 5),
                "largest_shard": compared[worst].shard,
                "largest_key": compared[worst].key,
            },
        }
    )
    if conditions:
        result.problems.extend(
            each.problem(artifact.details["condition"]["kind"]) for each in conditions if each.is_wrong
        )
        result.facts["condition_encoded_again"] = facts_of(conditions)
    result.notes.insert(0, _summary(result.facts))
    return result


@dataclass(frozen=True)
class _Compared:
    """A view of a sample beside what the first stage makes of its picture now.

    Attributes:
        shard, key: which sample.
        cached, anew: (2 or 1, C, h, w) moments, as cached and as encoded now.
        cached_db, own_db: PSNR of the picture decoded from each; NaN where there is nothing to decode.
        view: which view; 0 is the picture itself.
    """

    shard: str
    key: str
    cached: NDArray[np.float32]
    anew: NDArray[np.float32]
    cached_db: float
    own_db: float
    view: int = 0


def _views(artifact: Artifact) -> ViewsConfig | None:
    views = artifact.manifest.config.get("views")
    return ViewsConfig.model_validate(views) if views else None


@torch.inference_mode()
def _compare(
    first_stage: FirstStage, sample: Sample, original: Original, view: int, views: ViewsConfig | None
) -> _Compared:
    pixels = draw_view(original.pixels, view, views) if views else original.pixels
    x = to_unit_range(torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2))
    cached = torch.from_numpy(sample.of_view(view)).float()
    try:
        anew = first_stage.encode(x).moments[0]
    except ValueError as error:
        raise UserError(f"the picture of {sample.key} does not fit the first stage: {error}") from error

    def decoded_db(moments: torch.Tensor) -> float:
        decoded = first_stage.decode(moments[None, 0]).clamp(-1, 1)
        return min(float(psnr(x, decoded)), MOST_DB)

    fits = cached.shape == anew.shape
    cached_db = decoded_db(cached) if fits else float("nan")
    return _Compared(sample.shard, sample.key, cached.numpy(), anew.numpy(), cached_db, decoded_db(anew), view)


def _differences(compared: Sequence[_Compared]) -> list[float]:
    """Return of each sample how far the cached moments are from those encoded now, in standard deviations.

    Root mean square, in units of each channel's standard deviation over the samples; infinite for another shape.
    """
    # (2 C or C, samples * h * w)
    rows = int(np.prod(compared[0].anew.shape[:2]))
    channels = np.concatenate([each.anew.reshape(rows, -1) for each in compared], axis=1).astype(np.float64)
    spreads = np.maximum(channels.std(axis=1), LEAST_SPREAD * np.sqrt(np.square(channels).mean(axis=1)))
    spreads = np.maximum(spreads, np.finfo(np.float16).tiny)
    return [
        float(np.sqrt(np.mean(np.square((each.cached - each.anew).reshape(rows, -1) / spreads[:, None]))))
        if each.cached.shape == each.anew.shape
        else float("inf")
        for each in compared
    ]


def _problems(
    compared: Sequence[_Compared], differences: Sequence[float], tolerance: float, first_stage: str
) -> Iterator[str]:
    """Yield a line for each shard that holds samples which are not what the first stage makes of their pictures."""
    shards: dict[str, list[tuple[_Compared, float]]] = {}
    for each, difference in zip(compared, differences, strict=True):
        shards.setdefault(each.shard, []).append((each, difference))
    for shard, samples in shards.items():
        wrong = [(each, difference) for each, difference in samples if _is_wrong(each, difference, tolerance)]
        if not wrong:
            continue
        each, difference = wrong[0]
        if each.cached.shape != each.anew.shape:
            found = f"it has the shape {each.cached.shape}, and encoded again {each.anew.shape}"
        else:
            found = (
                f"encoded again, its moments differ by {difference:.2g} of their spread ({tolerance:g} at most); "
                f"decoded, it has a PSNR of {each.cached_db:.1f} dB (the first stage itself: {each.own_db:.1f} dB)"
            )
        yield (
            f"{shard}: sample {each.key}{f', view {each.view},' if each.view else ''} is not what autoencoder "
            f"{first_stage} makes of its picture: {found}; {len(wrong)} of {len(samples)} latents looked at are so: "
            "another encoder made them, or they are of other pictures"
        )


def _is_wrong(each: _Compared, difference: float, tolerance: float) -> bool:
    # So that what is not a number is wrong.
    good = difference <= tolerance and each.cached_db >= min(each.own_db, INDISTINGUISHABLE_DB) - LOSS_DB
    return not good


def _median_and_worst(compared: Sequence[_Compared], values: Sequence[float]) -> dict[str, Any]:
    finite = [number for number, value in enumerate(values) if np.isfinite(value)]
    if not finite:
        return {}
    ascending = sorted(finite, key=values.__getitem__)
    return {
        f"{name}{part}": value
        for name, number in (("median", ascending[(len(finite) - 1) // 2]), ("worst", ascending[0]))
        for part, value in (
            ("", round(values[number], 2)),
            ("_shard", compared[number].shard),
            ("_key", compared[number].key),
        )
    }


def _summary(facts: dict[str, Any]) -> str:
    cached, own = facts["psnr_db"], facts["reconstruction_psnr_db"]
    again = facts["encoded_again"]
    shown = (
        f"PSNR {cached['median']:.1f} dB in the median ({cached['median_key']}), {cached['worst']:.1f} dB at worst "
        f"({cached['worst_key']}), where the first stage itself has {own['median']:.1f} and {own['worst']:.1f} dB; "
        if cached
        else ""
    )
    return (
        f"{facts['samples']} samples decoded and encoded again: {shown}moments differ by "
        f"{again['largest_difference']:.2g} of their spread at most ({again['largest_key']})"
        + _condition_summary(facts)
    )


def _condition_summary(facts: dict[str, Any]) -> str:
    again = facts.get("condition_encoded_again")
    return f"; {again['largest_file']} by {again['largest_difference']:.2g} ({again['largest_key']})" if again else ""


@torch.inference_mode()
def _decoded_alone(first_stage: FirstStage, samples: Iterator[list[Sample]], why: str) -> Verification:
    """Check what can be checked without pictures: that the latents can be decoded."""
    result, count = Verification(), 0
    for sample in (sample for of_shard in samples for sample in of_shard):
        count += 1
        latent = torch.from_numpy(sample.moments[None, 0]).float()
        try:
            finite = bool(first_stage.decode(latent).isfinite().all())
        except (ValueError, RuntimeError) as error:
            problem = (
                f"{sample.shard}: sample {sample.key} does not fit the first stage: {' '.join(str(error).split())}"
            )
            result.problems.append(problem)
            break
        if not finite:
            result.problems.append(f"{sample.shard}: sample {sample.key} decodes to values that are not finite")
    result.notes.append(f"{count} samples decoded, but not compared with the pictures: {why}")
    result.facts["samples"] = count
    return result
