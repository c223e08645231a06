"""Measure images batch by batch; the measurements of several workers merge into one.

Shapes: images: (B, 3, H, W) in [-1, 1]; index: (B,) numbers of the images in the whole set.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_core.images import to_unit_range
from ldm_core.metrics.catalogue import METRICS, check_names
from ldm_core.metrics.feature_set import FeatureSet, IndexedRows
from ldm_core.metrics.inception_score import InceptionScoreSums
from ldm_core.metrics.networks.extractors import FeatureExtractor, Networks
from ldm_core.metrics.pixels import psnr, ssim
from ldm_core.metrics.preprocessing import quantize
from ldm_core.metrics.statistics import ImageStatistics, Provenance

AnyNetwork = TypeVar("AnyNetwork")

FEATURE_NETWORKS = ("inception", "clip")
SCORES = ("clip_score", "psnr", "ssim", "lpips")


class Measurement:
    """Accumulates what metrics need from images. Holds no network, so that it can be sent between workers.

    Args:
        names: names of metrics whose networks are loaded.
        stored: networks ("inception", "clip") whose reference statistics are stored already: reference images are not
            measured again by these, except for reconstruction_fid.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, names: Iterable[str], *, stored: Iterable[str] = ()) -> None:
        self.names = check_names(names)
        self.stored = frozenset(stored)
        self.generated = _feature_sets("generated", self.names)
        fresh = [name for name in self.names if METRICS[name].paired or METRICS[name].network not in self.stored]
        self.reference = _feature_sets("reference", fresh)
        self.inception_score = InceptionScoreSums()
        self.scores = {name: IndexedRows() for name in SCORES if name in self.names}
        # Rows of no width: the numbers of the generated images, which tell if one was measured twice.
        self.counted = IndexedRows()
        self.paired_count = 0
        self.provenance: dict[str, Provenance] = {}

    def add(
        self,
        networks: Networks,
        generated: Tensor,
        *,
        start: int,
        reference: Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Measure a batch of generated images.

        Args:
            networks: networks of all the metrics.
            generated: (B, 3, H, W) in [-1, 1].
            start: number of the first image in the whole set; the others follow it.
            reference: (B, 3, H, W) images that the generated ones should equal, for metrics of pairs.
            captions: B captions, for the CLIP score.

        Raises:
            ValueError: if images, pairs or captions do not fit together, a feature is not finite, or a network is not
                the one that measured earlier batches.
        """
        x, index = to_unit_range(quantize(generated)), torch.arange(start, start + len(generated))
        if reference is not None and reference.shape != generated.shape:
            raise ValueError(
                "a generated image and its reference must be of one shape, got batches "
                f"{tuple(generated.shape)} and {tuple(reference.shape)}: resize or crop one of them"
            )
        if captions is not None and len(captions) != len(x):
            raise ValueError(f"each image must have its caption, got {len(captions)} captions for {len(x)} images")
        self.counted.update(index, torch.empty(len(index), 0))
        networks_used = {METRICS[name].network for name in self.names}
        logits, embeddings = self._measure(networks, x, index, self.generated, networks_used)
        if "inception_score" in self.names and logits is not None:
            self.inception_score.update(index, logits)
        if "clip_score" in self.names and embeddings is not None and captions is not None:
            clip = _present(networks.clip, "clip")
            # CLIP score: Hessel et al. 2021, Sec. 3, with the customary weight of 100 instead of their 2.5.
            cosine = F.cosine_similarity(embeddings, clip.text(captions))
            self.scores["clip_score"].update(index, 100 * cosine.clamp(min=0))
        if reference is not None:
            self._add_pairs(networks, x, to_unit_range(quantize(reference)), index)

    def add_reference(self, networks: Networks, images: Tensor, *, start: int) -> None:
        """Measure a batch of reference images that are not paired with generated ones.

        Args:
            networks: networks of all the metrics.
            images: (B, 3, H, W) in [-1, 1].
            start: number of the first image in the whole reference set.

        Raises:
            ValueError: if the images have another shape or range, a feature is not finite, or a network is not the
                one that measured earlier batches.
        """
        index = torch.arange(start, start + len(images))
        self._measure(networks, to_unit_range(quantize(images)), index, self.reference, self.reference)

    def merge(self, other: "Measurement") -> None:
        """Add another worker's measurement.

        Raises:
            ValueError: if it is of other metrics, networks or resize modes.
        """
        if (self.names, self.stored) != (other.names, other.stored):
            raise ValueError(f"parts to merge must be of the same metrics, got {self.names} and {other.names}")
        for provenance in other.provenance.values():
            self._note(provenance)
        for mine, theirs in ((self.generated, other.generated), (self.reference, other.reference)):
            for kind, features in theirs.items():
                mine[kind].merge(features)
        for name, rows in other.scores.items():
            self.scores[name].merge(rows)
        self.inception_score.merge(other.inception_score)
        self.counted.merge(other.counted)
        self.paired_count += other.paired_count

    def reference_statistics(self, network: str) -> ImageStatistics:
        """Sum up the reference images, to be stored.

        Args:
            network: "inception" or "clip"; one of the metrics must use it.

        Raises:
            ValueError: if no reference images were measured by that network, or one was measured twice.
        """
        if network not in self.provenance or network not in self.reference:
            raise ValueError(f"there must be reference images measured by {network}, got none: call add_reference")
        return self.reference[network].statistics(self.provenance[network])

    def _measure(
        self,
        networks: Networks,
        x: Tensor,
        index: Tensor,
        sets: dict[str, FeatureSet],
        used: Iterable[str | None],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the networks that are used and add to their sets; return the logits and CLIP embeddings of x."""
        logits = embeddings = None
        used, resolution = set(used), (x.shape[-2], x.shape[-1])
        if "inception" in used:
            inception = _present(networks.inception, "inception")
            self._note(provenance_of("inception", inception))
            features, logits = inception(x)
            if "inception" in sets:
                sets["inception"].update(index, features, resolution)
        if "clip" in used:
            clip = _present(networks.clip, "clip")
            self._note(provenance_of("clip", clip))
            embeddings = clip(x)
            if "clip" in sets:
                sets["clip"].update(index, embeddings, resolution)
        return logits, embeddings

    def _add_pairs(self, networks: Networks, x: Tensor, y: Tensor, index: Tensor) -> None:
        self.paired_count += len(index)
        self._measure(networks, y, index, self.reference, self.reference)
        for name, score in (("psnr", psnr), ("ssim", ssim)):
            if name in self.scores:
                self.scores[name].update(index, score(x, y))
        if "lpips" in self.scores:
            lpips = _present(networks.lpips, "lpips")
            self._note(Provenance(extractor="lpips", digest=lpips.digest, resize="none"))
            with torch.inference_mode():
                self.scores["lpips"].update(index, lpips(x, y))

    def _note(self, provenance: Provenance) -> None:
        """Record a network's provenance, or raise ValueError if another one was recorded before."""
        known = self.provenance.setdefault(provenance.extractor, provenance)
        known.check_same(provenance, what="every part of a measurement")


def provenance_of(kind: str, network: FeatureExtractor) -> Provenance:
    """Return the provenance of a network's features."""
    return Provenance(extractor=kind, digest=network.digest, resize=network.resize)


def _feature_sets(side: str, names: Iterable[str]) -> dict[str, FeatureSet]:
    """Return an empty set for each network in whose features a metric compares two sets of images."""
    compared = [METRICS[name] for name in names if METRICS[name].reference or METRICS[name].paired]
    return {
        kind: FeatureSet(
            f"{kind} features of {side} images",
            keep_features=any(metric.features for metric in compared if metric.network == kind),
        )
        for kind in FEATURE_NETWORKS
        if any(metric.network == kind for metric in compared)
    }


def _present(network: AnyNetwork | None, kind: str) -> AnyNetwork:
    """Return the network, or raise ValueError: metrics without their network must be left out beforehand."""
    if network is None:
        raise ValueError(
            f"the metrics asked for need the {kind} network, got none: leave out those that Extractors.load lists"
        )
    return network
