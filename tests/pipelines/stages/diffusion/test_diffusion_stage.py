"""The diffusion stage: reproducible batches, training, and what does not fit together."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_core import checkpoint, load
from pipelines.conditions.kinds import kind_of
from pipelines.errors import MisuseError, UserError
from pipelines.shards.node_cache import cache_folder
from pipelines.shards.randomness import Purpose
from pipelines.stages.diffusion.artifact import load_model
from pipelines.stages.diffusion.config import DiffusionConfig
from pipelines.stages.diffusion.learner import DiffusionLearner, DiffusionTask
from pipelines.stages.diffusion.stage import STAGE
from pipelines.stages.diffusion.work import model_config
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from pipelines.training.loader.open import tensors_of
from tests.in_this_process import in_this_process
from tests.tiny import TINY_TEXT, TINY_UNET
from tests.tiny_artifacts import contents, first_stage_artifact, latents_artifact, run_stage


def config(**changes: Any) -> DiffusionConfig:
    training = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "ema_decay": 0.5,
        "workers": 1,
        "use_gpu": False,
        "log_every_steps": 2,
        "sample_every_steps": 3,
    }
    values = {
        "unet": TINY_UNET,
        "condition": {"kind": "text", "transformer": TINY_TEXT},
        "training": training,
        "preview": {"num_steps": 2},
        "preview_prompts": 3,
    }
    return DiffusionConfig.model_validate(values | changes)


@pytest.fixture
def upstream(tmp_path: Path) -> dict[str, Artifact]:
    autoencoder = first_stage_artifact(tmp_path)
    return {"autoencoder": autoencoder, "latents": latents_artifact(tmp_path, autoencoder.details["encoder_sha256"])}


def learner(upstream: dict[str, Artifact], **changes: Any) -> DiffusionLearner:
    settings = config(**changes)
    model = model_config(settings, upstream["latents"], upstream["autoencoder"])
    task = DiffusionTask(
        model=model,
        config=settings,
        seed=0,
        latents=upstream["latents"],
        autoencoder=upstream["autoencoder"],
        prompts=("red circle",),
    )
    return task.build(torch.device("cpu"))


def test_a_model_is_trained_and_samples_pictures(tmp_path: Path, upstream: dict[str, Artifact]) -> None:
    with in_this_process():
        artifact = run_stage(STAGE, config(), tmp_path, upstream)
    assert sorted(contents(artifact)) == [
        "history.json",
        "model/config.json",
        "model/model.safetensors",
        "model/vocab.txt",
        "previews/step_00000003.png",
        "previews/step_00000006.png",
    ]
    assert set(artifact.details["parameters"]) == {"unet", "text", "first_stage"}
    model, prompts = load_model(artifact)
    assert model.scale_factor == 0.5
    tokens = prompts.inputs(["red circle"])
    images = model.sample(tokens, unconditional=prompts.unconditional(), seeds=[0], num_steps=2, guidance_scale=3.0)
    assert images.shape == (1, 3, 32, 32)
    assert images.isfinite().all()


def test_a_batch_is_the_same_for_any_number_of_workers_and_after_any_restart(upstream: dict[str, Artifact]) -> None:
    one, other = learner(upstream), learner(upstream)
    tensors_of(other.batches, other.batches.order.slice(100, 0, 1))
    for step in (0, 4, 30):
        whole = tensors_of(one.batches, one.batches.order.slice(step, 0, 1))
        parts = [tensors_of(other.batches, other.batches.order.slice(step, rank, 4)) for rank in range(4)]
        # Which captions differ is each worker's own affair.
        for name in whole.keys() - {"distinct", "caption"}:
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name]), name


def test_batches_of_a_remote_root_are_the_same_and_its_shards_go_at_the_end(
    upstream: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "disk"))
    latents, remote = upstream["latents"], Storage("memory://latents-of-another-node")
    for name in latents.storage.files_below():
        remote.write_bytes(name, latents.storage.read_bytes(name))
    here, there = learner(upstream), learner({**upstream, "latents": replace(latents, storage=remote)})
    for step in range(12):
        there.batches.reader.fetch_ahead(there.batches.order.shards_ahead(step, 0, 1))
        batch = tensors_of(there.batches, there.batches.order.slice(step, 0, 1))
        for name, tensor in tensors_of(here.batches, here.batches.order.slice(step, 0, 1)).items():
            assert torch.equal(batch[name], tensor), name
    assert len(list(cache_folder().iterdir())) > 2
    there.batches.reader.close()
    assert not cache_folder().exists()


def test_held_out_samples_are_never_trained_on_and_previewed_first(tmp_path: Path) -> None:
    autoencoder = first_stage_artifact(tmp_path)
    latents = latents_artifact(tmp_path, autoencoder.details["encoder_sha256"], rows=(90, 0, 60))
    trainer = learner({"autoencoder": autoencoder, "latents": latents})
    held_out = trainer.batches.latents.held_out
    assert len(held_out) == 2
    epoch = {
        trainer.batches.order.sample(position).place for position in range(2 * trainer.batches.order.samples_per_epoch)
    }
    every = {(shard, row) for shard, rows in ((0, 90), (2, 60)) for row in range(rows)}
    assert every - epoch == set(held_out)
    facts = [json.loads(trainer.batches.latents.reader.facts(*place)) for place in held_out]
    captions = kind_of(config().condition).preview_prompts(latents, trainer.batches.latents.facts(), 3)
    assert captions[:2] == [sample["captions"][0] for sample in facts]
    assert len(set(captions)) == 3


def test_each_epoch_draws_anew(upstream: dict[str, Artifact]) -> None:
    trainer = learner(upstream)
    epoch = trainer.batches.order.samples_per_epoch
    place = trainer.batches.order.sample(5)[2:]
    again = next(p for p in range(epoch, 3 * epoch) if trainer.batches.order.sample(p)[2:] == place)
    first, second = (tensors_of(trainer.batches, [trainer.batches.order.sample(position)]) for position in (5, again))
    assert torch.equal(first["moments"], second["moments"])
    for purpose in (Purpose.NOISE, Purpose.POSTERIOR):
        assert not torch.equal(trainer.noise(purpose, first), trainer.noise(purpose, second))


def test_all_captions_are_used_and_some_are_dropped(upstream: dict[str, Artifact]) -> None:
    trainer = learner(upstream, condition={"kind": "text", "transformer": TINY_TEXT, "dropout": 0.25})
    batch = tensors_of(trainer.batches, [trainer.batches.order.sample(position) for position in range(2100)])
    empty = (batch["tokens"] == torch.tensor(upstream["latents"].details["empty_tokens"])).all(dim=1).float().mean()
    assert float(empty) == pytest.approx(0.25, abs=0.04)
    seen = {tuple(tokens) for tokens in batch["tokens"].tolist()}
    for shard, rows in enumerate(trainer.batches.latents.reader.rows_per_shard):
        for row in range(rows):
            assert {tuple(tokens) for tokens in trainer.batches.latents.get(shard, row)[1][0].tolist()} <= seen
    inputs = trainer.batches.source.examples.inputs(batch)
    assert torch.equal(inputs.inputs[inputs.row], batch["tokens"])
    assert len(inputs.inputs) < 0.5 * len(batch["tokens"]), "the pictures have few captions"
    assert batch["t"].min() < 20
    assert batch["t"].max() > 980


def test_the_loss_of_an_untrained_network_is_that_of_predicting_nothing(upstream: dict[str, Artifact]) -> None:
    """The output convolution starts at zero, so the eps loss is E[noise^2] = 1 (Eq. 3)."""
    trainer = learner(upstream)
    losses = trainer.losses(
        trainer.network, tensors_of(trainer.batches, [trainer.batches.order.sample(p) for p in range(256)])
    )
    assert losses.shape == (256,)
    assert float(losses.detach().mean()) == pytest.approx(1.0, abs=0.05)


def test_the_network_sees_scaled_draws_of_the_posterior(upstream: dict[str, Artifact]) -> None:
    """Sec. 4.3.2: z = scale_factor * (mean + std * noise), noised to timestep t."""
    trainer = learner(upstream)
    batch = tensors_of(trainer.batches, [trainer.batches.order.sample(position) for position in range(4)])
    inputs = []

    def network(z_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        inputs.append(z_t)
        return torch.zeros_like(z_t)

    trainer.losses(network, batch)
    mean, logvar = batch["moments"].float().unbind(1)
    z0 = 0.5 * (mean + (0.5 * logvar).exp() * trainer.noise(Purpose.POSTERIOR, batch))
    alpha_bar = trainer.objective.schedule.alphas_cumprod[batch["t"]].view(-1, 1, 1, 1)
    torch.testing.assert_close(
        inputs[0], alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * trainer.noise(Purpose.NOISE, batch)
    )


def test_latents_of_another_encoder_are_refused(tmp_path: Path, upstream: dict[str, Artifact]) -> None:
    foreign = latents_artifact(tmp_path / "foreign", "0" * 64)
    with pytest.raises(UserError, match=r"made by encoder 000000000000, but autoencoder .* --from latents"):
        run_stage(STAGE, config(), tmp_path, {**upstream, "latents": foreign})


def test_a_unet_of_another_size_is_refused(tmp_path: Path, upstream: dict[str, Artifact]) -> None:
    unet = replace(config().unet, latent_size=8)
    with pytest.raises(MisuseError, match=r"diffusion.unet.latent_size is 8, but the latents are 4x4: set it to"):
        run_stage(STAGE, config(unet=unet), tmp_path, upstream)
    text = {"kind": "text", "transformer": {"width": 64, "layers": 1}}
    with pytest.raises(MisuseError, match="context_dim must be the conditioner's width"):
        run_stage(STAGE, config(condition=text), tmp_path, upstream)


def test_a_truncated_latents_shard_is_refused(tmp_path: Path, upstream: dict[str, Artifact]) -> None:
    path = Path(upstream["latents"].storage.path("000002.tar"))
    path.write_bytes(path.read_bytes()[:-2048])
    with (
        pytest.raises(UserError, match=r"000002.tar has \d+ bytes, but \d+ were committed: `ldm verify"),
        in_this_process(),
    ):
        run_stage(STAGE, config(), tmp_path, upstream)


def test_the_model_is_what_recipe_and_latents_say(upstream: dict[str, Artifact]) -> None:
    model = learner(upstream, parameterization="v", loss="l1").task.model
    assert (model.parameterization, model.loss, model.scale_factor) == ("v", "l1", 0.5)
    assert model.conditioner is not None
    assert model.conditioner.max_length == upstream["latents"].details["max_length"]


FLOW = {
    "schedule": {"kind": "rectified_flow", "shift": 2.0},
    "parameterization": "flow",
    "timesteps": {"kind": "logit_normal"},
}


def test_a_rectified_flow_learns_the_velocity_at_the_timesteps_of_its_positions(upstream: dict[str, Artifact]) -> None:
    trainer = learner(upstream, **FLOW)
    samples = [trainer.batches.order.sample(position) for position in range(256)]
    batch = tensors_of(trainer.batches, samples)
    assert batch["t"].dtype == torch.float32
    assert torch.equal(tensors_of(trainer.batches, samples[7:8])["t"], batch["t"][7:8])
    # The same words as a chain's timesteps, by another distribution: its median is where Eq. (23) takes 1/2.
    chain = tensors_of(learner(upstream).batches, samples)["t"]
    assert ((batch["t"] > 1000 * 2 / 3) == (chain >= 500)).all()
    seen = []

    def network(z_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        seen.append((z_t, t))
        return torch.zeros_like(z_t)

    losses = trainer.losses(network, batch)
    ((z_t, t),) = seen
    noise, time = trainer.noise(Purpose.NOISE, batch), (batch["t"] / 1000).view(-1, 1, 1, 1)
    z0 = (z_t - time * noise) / (1 - time)
    assert torch.equal(t, batch["t"])
    torch.testing.assert_close(losses, (noise - z0).square().flatten(1).mean(1), rtol=1e-3, atol=0)


def test_a_trained_rectified_flow_is_previewed_saved_and_loaded(tmp_path: Path, upstream: dict[str, Artifact]) -> None:
    trainer = learner(upstream, preview={"num_steps": 2, "sampler": "heun"}, **FLOW)
    assert trainer.preview() is not None
    checkpoint.save(trainer._model, tmp_path / "model", tokenizer=trainer._prompts.tokenizer)
    model = load(tmp_path / "model")
    assert model.config.schedule == trainer.task.model.schedule
    assert model.config.parameterization == "flow"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": {"kind": "rectified_flow"}}, "with a rectified_flow use parameterization flow"),
        ({**FLOW, "min_snr_gamma": 5.0}, "min_snr_gamma gives the last timestep of a rectified_flow no weight"),
        ({"schedule": {"shift": 2.0}}, "of kind scaled_linear has no shift"),
        ({"timesteps": {"mean": 1.0}}, "uniform timesteps have neither mean nor std"),
    ],
)
def test_settings_that_cannot_be_learned_are_refused_with_the_recipe(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)
