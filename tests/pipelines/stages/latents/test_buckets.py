"""Pictures of two sizes from pairs to batches: each batch has one, and every sample has its turn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_core import checkpoint, presets
from ldm_core.networks.autoencoder import build_first_stage
from pipelines.errors import UserError
from pipelines.shards.buckets import BucketOrder, bucket_of
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.autoencoder.learner import AutoencoderTask
from pipelines.stages.autoencoder.stage import STAGE as AUTOENCODER
from pipelines.stages.diffusion import work
from pipelines.stages.diffusion.stage import STAGE as DIFFUSION
from pipelines.stages.latents.inspection.sheet import contact_sheet
from pipelines.stages.latents.inspection.verify import verify
from pipelines.stages.latents.section import section
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.stages.pairs.stage import STAGE as PAIRS
from pipelines.store.ledger import Artifact
from pipelines.training.loader.open import open_loader, tensors_of
from tests.golden.test_golden_losses import train
from tests.pipelines.stages.diffusion.test_diffusion_stage import config, learner
from tests.pipelines.stages.diffusion.test_mix import train_here
from tests.pipelines.stages.latents.in_this_process import make
from tests.tiny_artifacts import latents_artifact, run_stage

CPU = torch.device("cpu")
TRAINING = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "workers": 1, "use_gpu": False, "log_every_steps": 1}
SIZES = {"64x16": (16, 64), "32x32": (32, 32)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("buckets")


@pytest.fixture(scope="module")
def upstream(ray_cluster: None, root: Path) -> Mapping[str, Artifact]:
    """Wide pictures and squares, two of three wide, through pairs, an imported first stage and latents."""
    source, random = root / "source", np.random.default_rng(0)
    source.mkdir()
    for number in range(150):
        size = (48, 48, 3) if number % 3 == 0 else (32, 128, 3)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(source / f"{number:03d}.png")
        (source / f"{number:03d}.txt").write_text("a wide picture" if number % 3 else "a square")
    torch.manual_seed(0)
    checkpoint.save(build_first_stage(presets.first_stage("tiny-kl-f8")), root / "weights")
    values = {"image_size": 32, "resize": "buckets", "buckets": {"step": 16, "max_aspect": 4}, "rows_per_shard": 40}
    settings = PairsConfig.model_validate({"source": str(source), "encode": "png", "workers": 1, **values})
    pairs = run_stage(PAIRS, settings, root, {})
    first_stage = run_stage(AUTOENCODER, autoencoder(weights=str(root / "weights")), root, {"pairs": pairs})
    return {"pairs": pairs, "autoencoder": first_stage, "latents": make(root, "key", pairs, first_stage)}


def autoencoder(**changes: Any) -> AutoencoderConfig:
    return AutoencoderConfig.model_validate({"model": "tiny-kl-f8"} | changes)


def test_an_imported_first_stage_is_measured_on_pictures_of_both_sizes(upstream: Mapping[str, Artifact]) -> None:
    pairs, found = upstream["pairs"], upstream["autoencoder"]
    assert pairs.details["buckets"] == {"64x16": 100, "32x32": 50}
    assert found.details["import_check"]["psnr_pictures"] == pairs.details["held_out_samples"] == 2
    with Image.open(found.storage.path("reconstructions.png")) as grid:
        assert grid.width > 8 * 128, "eight originals, in the middle that both sizes have, above their reconstructions"


def test_latents_have_the_shape_of_the_default_bucket_and_list_all(upstream: Mapping[str, Artifact]) -> None:
    latents = upstream["latents"]
    assert latents.details["latent_shape"] == [4, 4, 4]
    assert latents.details["latent_shapes"] == [[4, 2, 8], [4, 4, 4]]
    assert [record.name for record in latents.shards()] == [record.name for record in upstream["pairs"].shards()]
    assert "4 × 2 × 8, 4 × 4 × 4" in section(latents).html


def test_latents_of_both_sizes_are_held_against_their_pictures_and_shown(
    own_threads: None, upstream: Mapping[str, Artifact]
) -> None:
    torch.set_num_threads(1)
    found = verify(upstream["latents"], 6)
    assert (found.facts["samples"], found.problems) == (6, [])
    assert contact_sheet(upstream["latents"].storage) is not None


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_batch_has_one_size_and_every_sample_is_seen_once_an_epoch_but_the_held_out_ones(
    upstream: Mapping[str, Artifact], stage: str
) -> None:
    trainer: Any
    if stage == "autoencoder":
        settings = autoencoder(training=TRAINING)
        trainer, artifact = AutoencoderTask(settings, 0, upstream["pairs"]).build(CPU), upstream["pairs"]
    else:
        trainer, artifact = learner(dict(upstream)), upstream["latents"]
    names, order = artifact.shards().names, trainer.batches.order
    assert isinstance(order, BucketOrder)
    seen: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for step in range(3 * order.samples_per_epoch // order.batch_size):
        samples = order.slice(step, 0, 1)
        height, width = SIZES[order.bucket(step)]
        for sample in samples:
            seen.setdefault((bucket_of(names[sample.shard]), sample.epoch), []).append(sample.place)
        if step < 6:
            batch = tensors_of(trainer.batches, samples)
            if stage == "autoencoder":
                assert batch["pixels"].shape == (4, height, width, 3)
                assert batch["noise"].shape == (4, 4, height // 8, width // 8)
            else:
                assert batch["moments"].shape == (4, 2, 4, height // 8, width // 8)
    held_out = set(held_out_places(artifact))
    assert len(held_out) == 2
    for bucket in SIZES:
        every = {
            (shard, row)
            for shard, record in enumerate(artifact.shards())
            for row in range(record.rows)
            if bucket_of(record.name) == bucket
        }
        for epoch in range(2):
            assert sorted(seen[bucket, epoch]) == sorted(every - held_out)
    trainer.batches.reader.close()


def test_a_process_of_the_loader_makes_the_same_batches_of_both_sizes_wherever_training_resumes(
    upstream: Mapping[str, Artifact],
) -> None:
    trainer = learner(dict(upstream))
    expected = [tensors_of(trainer.batches, trainer.batches.order.slice(step, 0, 1)) for step in range(12)]
    assert len({batch["moments"].shape for batch in expected[5:]}) == 2
    for first in (0, 5):
        loader = open_loader(trainer.batches, 0, 1, first, 12, processes=1, device=CPU)
        try:
            for batch in expected[first:]:
                found = loader.next()
                assert found.keys() == batch.keys()
                for name, tensor in batch.items():
                    assert torch.equal(found[name], tensor), name
        finally:
            loader.close()
    trainer.batches.reader.close()


def test_both_networks_are_trained_on_both_sizes(
    own_threads: None, upstream: Mapping[str, Artifact], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = autoencoder(training=TRAINING)
    task = AutoencoderTask(settings, 0, upstream["pairs"])
    assert np.isfinite(train(task, settings.training, root)["losses"]).all()
    monkeypatch.setattr(work, "fit", train_here)
    preview = {**TRAINING, "sample_every_steps": 2}
    artifact = run_stage(DIFFUSION, config(training=preview), root, upstream)
    assert artifact.details["steps"] == 2
    order = learner(dict(upstream)).batches.order
    assert isinstance(order, BucketOrder)
    assert {order.bucket(step) for step in range(2)} == set(SIZES)
    with Image.open(artifact.storage.path("previews/step_00000002.png")) as grid:
        assert grid.width > 128, "of the default bucket"


def test_latents_of_several_sizes_are_not_mixed_in(upstream: Mapping[str, Artifact], root: Path) -> None:
    encoder = upstream["autoencoder"].details["encoder_sha256"]
    own = {**upstream, "latents": latents_artifact(root / "own", encoder)}
    mix = [{"latents": upstream["latents"].storage.url, "weight": 0.5}]
    with pytest.raises(UserError, match="its latent shape is 4x2x8, 4x4x4, not 4x4x4; encode it by") as refusal:
        run_stage(DIFFUSION, config(mix=mix), root, own, key="mixed")
    assert "\n" not in str(refusal.value)
