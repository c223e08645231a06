"""Images in, values and reasons out: `evaluate`, measurements of several workers, stored statistics."""

import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_core.images import to_unit_range
from ldm_core.metrics import (
    METRICS,
    Evaluation,
    Extractors,
    ImageStatistics,
    Measurement,
    MetricUnavailableError,
    Networks,
    evaluate,
    psnr,
    results,
    ssim,
    summarize,
)
from ldm_core.metrics.frechet_distance import frechet_distance
from ldm_core.metrics.networks.inception import InceptionOutput
from ldm_core.metrics.preprocessing import quantize

CAPTIONS = ["a cat", "two dogs", "the sea", "a red car", "snow", "a bird"]


def images(count: int, size: int = 32, *, seed: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class PixelFeatures:
    """Stands in for Inception: a few pixels are the features, so that hundreds of images cost nothing."""

    def __init__(self, digest: str = "f00d", resize: str = "clean", spoiled: bool = False) -> None:
        self.digest, self.resize, self.spoiled = digest, resize, spoiled

    def __call__(self, images: Tensor) -> InceptionOutput:
        features = images.flatten(1)[:, :5].clone()
        if self.spoiled:
            features[1, 2] = torch.nan
        return InceptionOutput(features, images.flatten(1)[:, 5:9])


class PixelEmbeddings(PixelFeatures):
    """Stands in for CLIP in the same way; a caption's embedding is its length."""

    def __call__(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return images.flatten(1)[:, :6]

    def text(self, captions: Sequence[str]) -> Tensor:
        return torch.stack([torch.full((6,), float(len(caption))) for caption in captions])


STAND_INS = Networks(inception=PixelFeatures(), clip=PixelEmbeddings())
WITHOUT_LPIPS = [name for name in METRICS if name != "lpips"]


def measure(names: Sequence[str], parts: Sequence[range], networks: Networks = STAND_INS) -> Evaluation:
    """Measure images 0 to 39 and their references in parts, each by a worker of its own, and merge them."""
    generated, truth = images(40, 12, seed=0), images(40, 12, seed=1)
    whole = Measurement(names)
    for part in parts:
        worker = Measurement(names)
        for start in part[::10]:
            batch = slice(start, min(start + 10, part[-1] + 1))
            captions = [f"image {number}" for number in range(batch.start, batch.stop)]
            worker.add(networks, generated[batch], start=start, reference=truth[batch], captions=captions)
        whole.merge(pickle.loads(pickle.dumps(worker)))
    return results(whole, seed=5)


def test_every_metric_has_a_value_from_networks_given_by_path(
    inception_weights: Path, clip_folder: Path, alexnet_weights: Path
) -> None:
    extractors = Extractors(inception=inception_weights, clip=clip_folder, lpips=alexnet_weights)
    generated, truth = images(6, seed=0), images(6, seed=1)
    found = evaluate(
        METRICS,
        generated=generated.split(4),
        reference=truth.split(4),
        captions=CAPTIONS,
        extractors=extractors,
    )
    assert found.unavailable == {}
    assert list(found.results) == list(METRICS)
    assert all(math.isfinite(result.value) for result in found.results.values())
    assert found.results["reconstruction_fid"].value == found.results["fid"].value > 0
    fid = found.results["fid"]
    assert fid.settings["resize"] == "clean"
    assert fid.settings["images"] == fid.settings["reference_images"] == 6
    assert len(str(fid.settings["weights_sha256"])) == 64
    assert fid.warnings == (
        "6 images for 2048 features, the covariance is rank deficient: compare at equal counts only",
    )
    assert found.results["kid"].warnings == ("subsets of 6 images instead of 1000, all that the smaller set has",)
    assert "bounds the score" in found.results["inception_score"].warnings[0]
    # Metrics of pairs see the pictures as they would be saved.
    saved = [to_unit_range(quantize(x)) for x in (generated, truth)]
    assert found.results["psnr"].value == pytest.approx(psnr(*saved).mean().item(), rel=1e-6)
    assert found.results["ssim"].value == pytest.approx(ssim(*saved).mean().item(), rel=1e-6)
    assert found.results["ssim"].std == pytest.approx(ssim(*saved).std(correction=0).item(), rel=1e-4)


def test_a_metric_that_lacks_something_says_what_and_the_others_still_run(clip_folder: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "clip"
    lonely.mkdir()
    for name in ("config.json", "model.safetensors"):
        (lonely / name).write_bytes((clip_folder / name).read_bytes())
    batches = [images(3, seed=0)]
    found = evaluate(
        ["fid", "clip_score", "cmmd", "lpips", "psnr"],
        generated=batches,
        reference=batches,
        captions=CAPTIONS[:3],
        extractors=Extractors(clip=lonely, lpips=tmp_path / "absent.pth"),
    )
    assert list(found.results) == ["cmmd", "psnr"]
    assert found.results["cmmd"].value == pytest.approx(0, abs=1e-9)
    assert math.isinf(found.results["psnr"].value)
    assert found.results["psnr"].std is None
    assert found.unavailable == {
        "fid": "fid: no weights of the FID Inception-v3 (weights-inception-2015-12-05-6726825d.pth): get "
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth and give its path as Extractors(inception=PATH)",
        "clip_score": f"clip_score: no tokenizer in {lonely}: put tokenizer.json, or vocab.json and merges.txt, there",
        "lpips": f"lpips: no {tmp_path}/absent.pth with torchvision's VGG-16 or AlexNet (vgg16-397923af.pth, "
        "alexnet-owt-7be5be79.pth): get https://download.pytorch.org/models/vgg16-397923af.pth and give its path as "
        "Extractors(lpips=PATH)",
    }


def test_the_resize_mode_that_is_asked_for_is_the_one_in_the_result(inception_weights: Path) -> None:
    extractors = Extractors(inception=inception_weights, resize="tensorflow")
    found = evaluate(["inception_score"], generated=[images(1, seed=0)], extractors=extractors)
    assert found.results["inception_score"].settings["resize"] == "tensorflow"


@pytest.mark.parametrize(
    ("metric", "module", "reason"),
    [
        ("kid", "torch_fidelity", "the library torch-fidelity is missing: pip install torch-fidelity"),
        ("cmmd", "transformers", "the library transformers is missing: pip install transformers"),
        ("lpips", "torchvision", "the library torchvision is missing: pip install torchvision"),
        (
            "lpips",
            "torchmetrics",
            "the library torchmetrics, with LPIPS's learned weights, is missing: pip install torchmetrics",
        ),
    ],
)
def test_a_library_that_is_not_installed_is_a_reason_too(
    metric: str,
    module: str,
    reason: str,
    inception_weights: Path,
    clip_folder: Path,
    alexnet_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extractors = Extractors(inception=inception_weights, clip=clip_folder, lpips=alexnet_weights)
    monkeypatch.setitem(sys.modules, module, None)
    _, unavailable = extractors.load([metric, "psnr"])
    assert unavailable == {metric: f"{metric}: {reason}"}


def test_lpips_says_which_file_is_gone_if_torchmetrics_no_longer_ships_its_weights(
    alexnet_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchmetrics").mkdir()
    (tmp_path / "torchmetrics" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "torchmetrics", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    _, unavailable = Extractors(lpips=alexnet_weights).load(["lpips"])
    assert "no file" in unavailable["lpips"]
    assert "lpips_models/alex.pth with LPIPS's learned weights, of torchmetrics 1.9" in unavailable["lpips"]


def test_a_metric_without_reference_pairs_captions_or_enough_images_is_unavailable() -> None:
    measurement = Measurement(WITHOUT_LPIPS)
    measurement.add(STAND_INS, images(3, 12, seed=0), start=0)
    alone = results(measurement)
    assert list(alone.results) == ["inception_score"]
    assert alone.unavailable["fid"] == (
        "fid: no reference set: give reference= images or stored statistics= of inception"
    )
    assert alone.unavailable["psnr"] == (
        "psnr: nothing to hold the images against: give reference=, the one true image for each generated image"
    )
    assert "give captions=, one caption for each generated image" in alone.unavailable["clip_score"]
    measurement.add_reference(STAND_INS, images(5, 12, seed=1), start=0)
    unpaired = results(measurement)
    assert set(unpaired.results) == {"inception_score", "fid", "kid", "cmmd", "clip_fd"}
    assert unpaired.unavailable["precision"] == "precision: needs at least 4 images a set, got 3: take more"
    assert unpaired.unavailable["reconstruction_fid"] == (
        "reconstruction_fid: no true image for each generated one: give reference= in the same order"
    )


def test_parts_of_several_workers_merge_to_the_whole_in_any_order() -> None:
    whole = measure(WITHOUT_LPIPS, [range(40)])
    parts = measure(WITHOUT_LPIPS, [range(25, 40), range(10), range(10, 25)])
    assert list(whole.results) == WITHOUT_LPIPS
    for name, result in whole.results.items():
        other = parts.results[name]
        assert other.value == pytest.approx(result.value, rel=1e-10), name
        assert other.settings == result.settings
        assert other.warnings == result.warnings
    # What is computed from each image's own features, not from their sums, is the same to the last bit.
    for name in ("kid", "precision", "recall", "cmmd", "clip_score", "psnr", "ssim"):
        assert parts.results[name].value == whole.results[name].value


def test_the_clip_score_is_a_hundred_times_the_cosine_or_zero_if_that_is_negative() -> None:
    x = images(20, 12, seed=0)
    measurement = Measurement(["clip_score"])
    measurement.add(STAND_INS, x, start=0, captions=["caption"] * 20)
    saved = to_unit_range(quantize(x)).flatten(1)[:, :6]
    cosine = saved.sum(dim=1) / saved.norm(dim=1) / math.sqrt(6)
    assert cosine.min() < 0 < cosine.max()
    expected = 100 * cosine.clamp(min=0)
    found = results(measurement).results["clip_score"]
    assert found.value == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found.std == pytest.approx(expected.std(correction=0).item(), rel=1e-5)


def test_an_image_measured_twice_is_noticed() -> None:
    with pytest.raises(ValueError, match="an image must be measured once, got number 5 twice"):
        measure(["inception_score"], [range(10), range(5, 15)])


def test_parts_of_other_networks_or_metrics_do_not_merge() -> None:
    part, other = Measurement(["fid"]), Measurement(["fid"])
    part.add(STAND_INS, images(2, seed=0), start=0)
    other.add(Networks(inception=PixelFeatures(digest="beef")), images(2, seed=0), start=2)
    with pytest.raises(ValueError, match="got digest beef instead of f00d"):
        part.merge(other)
    with pytest.raises(ValueError, match="must be of the same metrics"):
        part.merge(Measurement(["kid"]))
    with pytest.raises(ValueError, match="got resize tensorflow instead of clean"):
        part.add(Networks(inception=PixelFeatures(resize="tensorflow")), images(2, seed=0), start=2)


def test_features_that_are_not_finite_are_named() -> None:
    networks = Networks(inception=PixelFeatures(spoiled=True))
    with pytest.raises(ValueError, match=r"inception features of generated images .* NaN or Inf for images \[8\]"):
        Measurement(["fid"]).add(networks, images(3, seed=0), start=7)


def test_inputs_that_do_not_fit_together_are_refused() -> None:
    four, five = [images(4, seed=0)], [images(5, seed=0)]
    with pytest.raises(ValueError, match=r"there is no metric 'fdi': did you mean fid\?"):
        evaluate(["fdi"], generated=four)
    with pytest.raises(ValueError, match="of one shape, got batches"):
        evaluate(["psnr"], generated=four, reference=five)
    with pytest.raises(ValueError, match="got generated images alone from batch 1 on"):
        evaluate(["psnr"], generated=four * 2, reference=four)
    with pytest.raises(ValueError, match="got reference images alone from batch 0 on"):
        evaluate(["psnr"], generated=[], reference=four)
    with pytest.raises(ValueError, match="got 2 captions for 4 images"):
        evaluate(["psnr"], generated=four, reference=four, captions=["a", "b"])
    with pytest.raises(ValueError, match="got 6 captions for 4 images"):
        evaluate(["psnr"], generated=four, reference=four, captions=CAPTIONS)
    with pytest.raises(ValueError, match="at least one image, got none"):
        evaluate(["psnr"], generated=[])
    with pytest.raises(ValueError, match="need the inception network, got none"):
        Measurement(["fid"]).add(Networks(), images(2, seed=0), start=0)


def test_stored_statistics_give_what_the_reference_images_give(clip_folder: Path, tmp_path: Path) -> None:
    extractors = Extractors(clip=clip_folder)
    generated, reference = images(8, seed=0), images(9, 48, seed=1)
    names = ["cmmd", "clip_fd"]
    fresh = evaluate(names, generated=[generated], reference=reference.split(5), extractors=extractors)
    summarize(reference.split(3), network="clip", extractors=extractors).save(tmp_path / "reference.safetensors")
    stored = ImageStatistics.load(tmp_path / "reference.safetensors")
    assert (stored.moments.count, stored.resolution) == (9, "48x48")
    found = evaluate(names, generated=[generated], statistics=[stored], extractors=extractors)
    for name in names:
        assert found.results[name].value == pytest.approx(fresh.results[name].value, rel=1e-4)
        assert "generated images are 32x32, the reference 48x48" in found.results[name].warnings
    summarize([reference], network="clip", extractors=extractors, keep_features=False).save(tmp_path / "moments")
    moments = ImageStatistics.load(tmp_path / "moments")
    assert moments.features is None
    assert frechet_distance(moments.moments, stored.moments) == pytest.approx(0, abs=1e-6)
    partial = evaluate(names, generated=[generated], statistics=[moments], extractors=extractors)
    assert list(partial.results) == ["clip_fd"]
    assert "hold no single features: compute them with keep_features=True" in partial.unavailable["cmmd"]
    with pytest.raises(ValueError, match="one reference set a network, got two of clip"):
        evaluate(names, generated=[generated], statistics=[stored, moments], extractors=extractors)
    with pytest.raises(MetricUnavailableError, match=r"kid: no weights of the FID Inception-v3"):
        summarize([reference], network="inception", extractors=extractors)


def statistics_of(network: PixelFeatures) -> ImageStatistics:
    measurement = Measurement(["kid"])
    measurement.add_reference(Networks(inception=network), images(6, seed=1), start=0)
    return measurement.reference_statistics("inception")


def test_a_reference_set_can_be_summed_up_by_several_workers() -> None:
    reference = images(9, 12, seed=1)
    whole, parts = Measurement(["kid"]), Measurement(["kid"])
    whole.add_reference(STAND_INS, reference, start=0)
    for start in (6, 0, 3):
        worker = Measurement(["kid"])
        worker.add_reference(STAND_INS, reference[start : start + 3], start=start)
        parts.merge(worker)
    expected, found = whole.reference_statistics("inception"), parts.reference_statistics("inception")
    assert found.features is not None
    assert expected.features is not None
    assert torch.equal(found.features, expected.features)
    torch.testing.assert_close(found.moments.covariance, expected.moments.covariance, rtol=1e-12, atol=1e-14)
    assert found.resolution == "12x12"


def test_stored_statistics_of_another_network_or_resize_mode_are_refused() -> None:
    measurement = Measurement(["fid"], stored=["inception"])
    measurement.add(STAND_INS, images(4, seed=0), start=0)
    assert results(measurement, statistics=[statistics_of(PixelFeatures())]).results["fid"].value > 0
    with pytest.raises(
        ValueError, match=r"stored reference statistics .* same inception network .* got digest beef instead of f00d"
    ):
        results(measurement, statistics=[statistics_of(PixelFeatures(digest="beef"))])
    with pytest.raises(ValueError, match="got resize tensorflow instead of clean: compute them again"):
        results(measurement, statistics=[statistics_of(PixelFeatures(resize="tensorflow"))])
    with pytest.raises(ValueError, match="reference images measured by inception, got none"):
        Measurement(["fid"]).reference_statistics("inception")


def test_a_foreign_network_is_refused_before_any_image_is_sampled(clip_folder: Path) -> None:
    def samples() -> Sequence[Tensor]:
        pytest.fail("an image was asked for")

    foreign = statistics_of(PixelFeatures())
    foreign = ImageStatistics(
        provenance=type(foreign.provenance)(extractor="clip", digest="f00d", resize="clip"),
        resolution=foreign.resolution,
        moments=foreign.moments,
    )
    with pytest.raises(ValueError, match="same clip network as these images' features, got digest f00d"):
        evaluate(
            ["clip_fd"],
            generated=(images for images in iter(samples, None)),
            statistics=[foreign],
            extractors=Extractors(clip=clip_folder),
        )


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there must be image statistics at .*: make them with `summarize`"):
        ImageStatistics.load(path)
    statistics = statistics_of(PixelFeatures())
    statistics.save(path)
    first = path.read_bytes()
    statistics.save(path)
    assert path.read_bytes() == first
    path.write_bytes(first[:-3])
    with pytest.raises(ValueError, match="must hold image statistics, but does not read"):
        ImageStatistics.load(path)
    path.write_bytes(first.replace(b'\\"count\\": 6', b'\\"count\\": 7'))
    with pytest.raises(ValueError, match="finite moments and features of one width and count"):
        ImageStatistics.load(path)
    path.write_bytes(first.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'))
    with pytest.raises(ValueError, match="must be of format version 1, got 9"):
        ImageStatistics.load(path)
