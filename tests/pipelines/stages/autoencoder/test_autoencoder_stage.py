"""The autoencoder stage: training, importing weights, and what it holds out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_core import checkpoint, presets
from ldm_core.networks.autoencoder import build_first_stage
from pipelines.errors import UserError
from pipelines.stages.autoencoder.artifact import first_stage_config, load_first_stage, load_weights
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.autoencoder.learner import AutoencoderTask
from pipelines.stages.autoencoder.reconstruction import MEASURED_PICTURES, ReconstructionLoss, ReconstructionTest
from pipelines.stages.autoencoder.stage import STAGE
from pipelines.stages.pairs.artifact import Pictures, open_pairs
from pipelines.stages.pairs.held_out import held_out_places
from tests.in_this_process import in_this_process
from tests.tiny_artifacts import contents, pairs_artifact, run_stage

TRAINING = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "ema_decay": 0.5,
    "workers": 1,
    "use_gpu": False,
    "log_every_steps": 2,
    "sample_every_steps": 3,
}


def config(**changes: object) -> AutoencoderConfig:
    return AutoencoderConfig.model_validate({"model": "tiny-kl-f8"} | changes)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = presets.first_stage("tiny-kl-f8")
    checkpoint.save(build_first_stage(model), tmp_path / "pretrained")
    return tmp_path / "pretrained"


def test_a_first_stage_is_trained_and_can_be_loaded(tmp_path: Path) -> None:
    pairs = pairs_artifact(tmp_path, rows=(40, 0, 60))
    with in_this_process():
        artifact = run_stage(STAGE, config(training=TRAINING), tmp_path, {"pairs": pairs})
    assert sorted(contents(artifact)) == [
        "first_stage/config.json",
        "first_stage/model.safetensors",
        "history.json",
        "previews/step_00000003.png",
        "previews/step_00000006.png",
        "reconstructions.png",
    ]
    assert artifact.details["trained"] is True
    assert artifact.details["steps"] == 6
    assert artifact.details["encoder_sha256"] == contents(artifact)["first_stage/model.safetensors"]
    assert np.isfinite(artifact.details["psnr_db"])
    history = artifact.storage.read_json("history.json")
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6]
    assert [entry["step"] for entry in history if "held_out" in entry] == [3, 6]
    assert first_stage_config(artifact) == presets.first_stage("tiny-kl-f8")
    first_stage = load_first_stage(artifact)
    assert not first_stage.training
    assert not any(weight.requires_grad for weight in first_stage.parameters())
    assert artifact.details["psnr_held_out"] is True
    with Image.open(artifact.storage.path("reconstructions.png")) as grid:
        assert grid.width > 8 * 128, "eight originals above their reconstructions"
        assert grid.height < 3 * 128


def test_pretrained_weights_are_taken_as_they_are(tmp_path: Path, weights: Path) -> None:
    pairs = pairs_artifact(tmp_path, rows=(9,))
    artifact = run_stage(STAGE, config(weights=str(weights)), tmp_path, {"pairs": pairs})
    assert artifact.details["trained"] is False
    assert artifact.details["import_check"]["psnr_held_out"] is False, "of nine pictures none is held out"
    loaded = load_first_stage(artifact).state_dict()
    for name, tensor in load_file(weights / "model.safetensors").items():
        assert torch.equal(loaded[name], tensor)
    file = run_stage(
        STAGE, config(weights=str(weights / "model.safetensors")), tmp_path, {"pairs": pairs}, key="from-file"
    )
    assert contents(file) == contents(artifact)


def test_other_weights_make_another_key(tmp_path: Path, weights: Path) -> None:
    given = config(weights=str(weights))
    before = STAGE.identity(given, 0, {"pairs": "k"})
    tensors = load_file(weights / "model.safetensors")
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, weights / "model.safetensors")
    assert STAGE.identity(given, 0, {"pairs": "k"})["inputs"] != before["inputs"]


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path, weights: Path) -> None:
    tensors = load_file(weights / "model.safetensors")
    del tensors["quant_conv.bias"]
    tensors["encoder.conv_in.weight"] = torch.zeros(16, 1, 3, 3)
    tensors["stranger"] = torch.zeros(1)
    save_file(tensors, weights / "model.safetensors")
    expected = (
        "are not those of autoencoder.model: missing: quant_conv.bias; unexpected: stranger; "
        "misshapen: encoder.conv_in.weight (16, 1, 3, 3) instead of (16, 3, 3, 3); set autoencoder.model"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        run_stage(STAGE, config(weights=str(weights)), tmp_path, {"pairs": pairs_artifact(tmp_path)})


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, weights: Path) -> None:
    tensors = load_file(weights / "model.safetensors")
    tensors["quant_conv.bias"][0] = float("nan")
    save_file(tensors, weights / "model.safetensors")
    with pytest.raises(UserError, match=r"cannot be used: weights must be finite, .*\(quant_conv\.bias\)"):
        run_stage(STAGE, config(weights=str(weights)), tmp_path, {"pairs": pairs_artifact(tmp_path)})


def test_half_precision_weights_are_widened(weights: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(weights / "model.safetensors").items()}
    save_file(tensors, weights / "model.safetensors")
    first_stage = load_weights(presets.first_stage("tiny-kl-f8"), weights / "model.safetensors")
    assert all(torch.equal(weight, tensors[name].float()) for name, weight in first_stage.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "autoencoder.weights: no file at .*x.safetensors; give"), (b"junk", "is not a readable safetensors file")],
)
def test_a_bad_weights_file_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        run_stage(STAGE, config(weights=str(path)), tmp_path, {"pairs": pairs_artifact(tmp_path)})


@pytest.mark.parametrize(
    ("rows", "side", "message"),
    [((0, 0), 32, "holds no samples"), ((3,), 36, "36x36 pixels do not divide by .* factor 8: set pairs.image_size")],
)
def test_pictures_that_cannot_be_trained_on_are_refused_at_once(
    tmp_path: Path, rows: tuple[int, ...], side: int, message: str
) -> None:
    pairs = pairs_artifact(tmp_path, rows=rows, side=side)
    with pytest.raises(UserError, match=message):
        run_stage(STAGE, config(training=TRAINING), tmp_path, {"pairs": pairs})


def test_reconstructions_are_measured_on_the_first_held_out_pictures(tmp_path: Path) -> None:
    pairs = pairs_artifact(tmp_path, rows=(150, 150), side=8)
    pictures, held_out = Pictures(open_pairs(pairs)), held_out_places(pairs)
    assert len(held_out) == 4
    task = AutoencoderTask(config=config(training=TRAINING), seed=0, pairs=pairs)
    assert task.build(torch.device("cpu")).batches.held_out == held_out
    every = [(shard, row) for shard in range(2) for row in range(150)]
    test = ReconstructionTest(pictures, held_out, every, [])
    assert test.held_out
    assert np.array_equal(test.pixels[0], pictures.stack(held_out))
    assert len(ReconstructionTest(pictures, every, every, []).pixels[0]) == MEASURED_PICTURES
    assert not ReconstructionTest(pictures, [], every[:8], []).held_out


def test_an_imported_first_stage_is_measured_on_held_out_pictures(tmp_path: Path, weights: Path) -> None:
    pairs = pairs_artifact(tmp_path, rows=(100, 60))
    artifact = run_stage(STAGE, config(weights=str(weights)), tmp_path, {"pairs": pairs})
    check = artifact.details["import_check"]
    assert (check["psnr_held_out"], check["psnr_pictures"]) == (True, 2)


@pytest.mark.parametrize(("preset", "loss_kind"), [("tiny-kl-f8", "l1"), ("tiny-kl-f8", "l2"), ("tiny-vq-f4", "l1")])
def test_the_loss_falls_and_every_weight_gets_a_gradient(preset: str, loss_kind: str) -> None:
    torch.manual_seed(0)
    model = presets.first_stage(preset)
    network = ReconstructionLoss(build_first_stage(model), config(training=TRAINING, reconstruction_loss=loss_kind))
    x = torch.rand(4, 3, 32, 32) * 0.4 + torch.rand(4, 3, 1, 1) - 0.7
    noise = torch.randn(4, model.embed_dim, 32 // model.downsampling_factor, 32 // model.downsampling_factor)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = network(x, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize(
    # In the release both terms are sums: over 3 * 16 * 16 values of the picture, and over 4 * 2 * 2 of the latent.
    ("reduction", "share"),
    [("mean", 1.0), ("sum", 4 * 2 * 2 / (3 * 16 * 16))],
)
def test_the_kl_term_is_a_mean_over_elements_or_the_sum_of_the_release(reduction: str, share: float) -> None:
    """Golden value: the posterior N(1, e^2) has a KL of (1 + e^2 - 1 - 2) / 2 nats per element."""
    model = presets.first_stage("tiny-kl-f8")
    first_stage = build_first_stage(model)
    torch.nn.init.zeros_(first_stage.quant_conv.weight)
    with torch.no_grad():
        assert first_stage.quant_conv.bias is not None
        first_stage.quant_conv.bias.copy_(torch.tensor([1.0] * 4 + [2.0] * 4))
    x, noise = torch.zeros(2, 3, 16, 16), torch.zeros(2, 4, 2, 2)
    with_kl, without = (
        ReconstructionLoss(first_stage, config(training=TRAINING, kl_weight=kl_weight, kl_reduction=reduction))(
            x, noise
        )
        for kl_weight in (1.0, 0.0)
    )
    expected = share * (1 + np.e**2 - 1 - 2) / 2
    torch.testing.assert_close(with_kl - without, torch.full((2,), expected, dtype=torch.float32))


def test_the_configuration_written_is_the_one_read(tmp_path: Path) -> None:
    pairs = pairs_artifact(tmp_path, rows=(2,))
    model = presets.first_stage("tiny-vq-f4")
    checkpoint.save(build_first_stage(model), tmp_path / "vq")
    artifact = run_stage(STAGE, config(model="tiny-vq-f4", weights=str(tmp_path / "vq")), tmp_path, {"pairs": pairs})
    assert first_stage_config(artifact) == model
    assert json.loads(artifact.storage.read_bytes("first_stage/config.json"))["codebook_size"] == 256
