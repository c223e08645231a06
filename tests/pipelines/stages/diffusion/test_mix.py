"""Several latents in one training: each with its share, found by what they hold, and refused if they do not fit."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipelines.errors import UserError
from pipelines.shards.order import SamplePosition
from pipelines.stage import StageContext
from pipelines.stages.diffusion import work
from pipelines.stages.diffusion.batches import LatentBatches
from pipelines.stages.diffusion.config import DiffusionConfig
from pipelines.stages.diffusion.learner import DiffusionLearner, DiffusionTask
from pipelines.stages.diffusion.mix import mixed_latents
from pipelines.stages.diffusion.section import section
from pipelines.stages.diffusion.stage import STAGE
from pipelines.stages.diffusion.work import model_config
from pipelines.stages.latents.artifact import Latents
from pipelines.store.ledger import Artifact
from pipelines.training.config import TrainingConfig
from pipelines.training.fit import finished
from pipelines.training.loader.held_out import FIRST_POSITION
from pipelines.training.loader.open import tensors_of
from pipelines.training.loader.source import NewArray
from pipelines.training.loop import Rank, TrainingLoop
from pipelines.training.task import Task
from tests.golden.test_golden_losses import NoCheckpoints, NoDriver
from tests.tiny import TINY_TEXT, TINY_UNET
from tests.tiny_artifacts import first_stage_artifact, latents_artifact, pairs_artifact, run_stage


def config(*mix: tuple[Artifact | str, float], **changes: Any) -> DiffusionConfig:
    training = {"steps": 12, "batch_size": 10, "learning_rate": 1e-3, "use_gpu": False}
    values = {
        "unet": TINY_UNET,
        "condition": {"kind": "text", "transformer": TINY_TEXT},
        "training": training,
        "preview": {"num_steps": 2},
        "preview_prompts": 1,
        "mix": [
            {"latents": where if isinstance(where, str) else where.storage.url, "weight": weight}
            for where, weight in mix
        ],
    }
    return DiffusionConfig.model_validate(values | changes)


@pytest.fixture
def upstream(tmp_path: Path) -> dict[str, Artifact]:
    autoencoder = first_stage_artifact(tmp_path)
    encoder = autoencoder.details["encoder_sha256"]
    return {"autoencoder": autoencoder, "latents": latents_artifact(tmp_path, encoder, rows=(40, 0, 50))}


@pytest.fixture
def other(tmp_path: Path, upstream: dict[str, Artifact]) -> Artifact:
    return other_latents(tmp_path / "elsewhere", upstream)


def other_latents(root: Path, upstream: dict[str, Artifact], **changes: Any) -> Artifact:
    facts = {"encoder_sha256": upstream["autoencoder"].details["encoder_sha256"], **changes}
    return latents_artifact(root, **{"rows": (70,), "seed": 1, "name": "other", "scale_factor": 3.0, **facts})


def train_here(task: Task, training: TrainingConfig, context: StageContext) -> dict[str, Any]:
    """Train in this process instead of Ray's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rank = Rank(0, 1, torch.device("cpu"))
    TrainingLoop(task, training, context.seed, context.writer, NoDriver(), rank).run(  # type: ignore[arg-type]
        NoCheckpoints()  # type: ignore[arg-type]
    )
    torch.set_num_threads(threads)
    details = finished(context.writer)
    assert details is not None
    return details


def learner(upstream: dict[str, Artifact], settings: DiffusionConfig) -> DiffusionLearner:
    task = DiffusionTask(
        model=model_config(settings, upstream["latents"], upstream["autoencoder"]),
        config=settings,
        seed=0,
        latents=upstream["latents"],
        autoencoder=upstream["autoencoder"],
        prompts=(),
        mixed=tuple(mixed_latents(settings)),
    )
    return task.build(torch.device("cpu"))


def test_a_model_is_trained_on_all_latents_each_with_its_share(
    tmp_path: Path, upstream: dict[str, Artifact], other: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[SamplePosition] = []
    assemble = LatentBatches.assemble

    def assemble_and_note(self: LatentBatches, samples: Sequence[SamplePosition], new: NewArray) -> None:
        trained_on.extend(sample for sample in samples if sample.position < FIRST_POSITION)
        assemble(self, samples, new)

    monkeypatch.setattr(LatentBatches, "assemble", assemble_and_note)
    monkeypatch.setattr(work, "fit", train_here)
    artifact = run_stage(STAGE, config((other, 0.3)), tmp_path, upstream)
    # The fourth shard is the other artifact's.
    assert Counter(sample.shard == 3 for sample in trained_on) == {True: 36, False: 84}
    for step in range(12):
        assert sum(sample.shard == 3 for sample in trained_on[10 * step : 10 * step + 10]) == 3
    assert len({sample.place for sample in trained_on if sample.epoch == 0 and sample.shard != 3}) == 84
    assert artifact.details["mix"] == [
        {"stage": "latents", "key": "other", "content": other.manifest.content, "weight": 0.3, "samples": 70}
    ]
    assert '"scale_factor": 0.5' in artifact.storage.read_bytes("model/config.json").decode(), "that of its own latents"
    assert "30 % of the samples" in section(artifact).html


def test_a_batch_holds_what_each_of_the_latents_has_there(upstream: dict[str, Artifact], other: Artifact) -> None:
    trainer = learner(upstream, config((other, 0.5)))
    samples = trainer.batches.order.slice(7, 0, 1)
    batch = tensors_of(trainer.batches, samples)
    own, theirs = Latents(upstream["latents"]), Latents(other)
    for sample, moments in zip(samples, batch["moments"], strict=True):
        cache, shard = (theirs, 0) if sample.shard == 3 else (own, sample.shard)
        np.testing.assert_array_equal(moments.numpy(), cache.get(shard, sample.row)[0])
        assert trainer.batches.reader.key(*sample.place) == cache.reader.key(shard, sample.row)
    assert {sample.shard == 3 for sample in samples} == {True, False}
    trainer.batches.reader.close()


def test_nothing_that_any_of_the_latents_holds_out_is_trained_on(
    upstream: dict[str, Artifact], other: Artifact
) -> None:
    trainer = learner(upstream, config((other, 0.4)))
    own, theirs = Latents(upstream["latents"]).held_out, Latents(other).held_out
    held_out = {*own, *((3 + shard, row) for shard, row in theirs)}
    assert len(own) == len(theirs) == 1
    every = {(shard, row) for shard, rows in ((0, 40), (2, 50), (3, 70)) for row in range(rows)}
    seen = {trainer.batches.order.sample(position).place for position in range(3 * 160)}
    assert every - seen == held_out
    assert trainer.batches.latents.held_out == own, "what the model is compared with"


def test_a_key_holds_what_the_latents_are_and_not_where(
    tmp_path: Path, upstream: dict[str, Artifact], other: Artifact
) -> None:
    def identity(*mix: tuple[Artifact | str, float]) -> dict[str, Any]:
        return STAGE.identity(config(*mix), 0, {})

    moved = tmp_path / "moved"
    shutil.copytree(other.storage.path(), moved)
    assert identity((str(moved), 0.2)) == identity((other, 0.2))
    another = other_latents(tmp_path / "another", upstream, seed=2)
    assert identity((another, 0.2)) != identity((other, 0.2)), "of the same key, with other contents"
    assert identity((other, 0.3)) != identity((other, 0.2))
    assert identity((other, 0.2), (another, 0.1)) != identity((another, 0.1), (other, 0.2))
    assert identity((other, 0.2))["inputs"] == {"mix/0": other.manifest.content}
    assert identity((other, 0.2))["config"]["mix"] == [{"weight": 0.2}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_sha256": "0" * 64}, r"its encoder is 000000000000, not [0-9a-f]{12}; encode it by a recipe with"),
        ({"latent_shape": [4, 8, 8]}, "its latent shape is 4x8x8, not 4x4x4;"),
        ({"condition": {"kind": "none"}}, 'its condition is {"kind": "none"}, not {"kind": "text"};'),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    tmp_path: Path, upstream: dict[str, Artifact], changes: dict[str, Any], message: str
) -> None:
    foreign = other_latents(tmp_path / "foreign", upstream, **changes)
    with pytest.raises(UserError, match=message) as refusal:
        run_stage(STAGE, config((foreign, 0.1)), tmp_path, upstream)
    assert str(refusal.value).startswith(f"{foreign.storage.url} cannot be mixed with latents latents: ")
    assert "\n" not in str(refusal.value)


def test_latents_of_another_vocabulary_are_refused(tmp_path: Path, upstream: dict[str, Artifact]) -> None:
    foreign = other_latents(tmp_path / "foreign", upstream)
    vocabulary = foreign.storage.read_bytes("vocab.txt")
    foreign.storage.write_bytes("vocab.txt", vocabulary + b"more\n")
    with pytest.raises(UserError, match=r"its digest of what the condition caches is .* the same condition.tokenizer"):
        run_stage(STAGE, config((foreign, 0.1)), tmp_path, upstream)


def test_latents_that_are_damaged_are_refused_before_training(
    tmp_path: Path, upstream: dict[str, Artifact], other: Artifact
) -> None:
    path = Path(other.storage.path("000000.tar"))
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"other/000000.tar has \d+ bytes but was committed with \d+"):
        run_stage(STAGE, config((other, 0.1)), tmp_path, upstream)


def test_what_is_no_finished_latents_is_refused_when_the_run_is_planned(
    tmp_path: Path, other: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"nowhere is no finished artifact \(manifest.json is missing\): give the"):
        STAGE.inputs(config((str(tmp_path / "nowhere"), 0.1)))
    pairs = pairs_artifact(tmp_path)
    with pytest.raises(UserError, match=r"holds pairs of format .*, but latents of format"):
        STAGE.inputs(config((pairs, 0.1)))
    values = other.storage.read_json("manifest.json")
    other.storage.write_json("manifest.json", {**values, "format_version": 2})
    with pytest.raises(UserError, match="holds latents of format 2, but latents of format 4 is needed"):
        STAGE.inputs(config((other.storage.url, 0.1)))
    other.storage.remove("manifest.json")
    with pytest.raises(UserError, match="other is no finished artifact"):
        STAGE.inputs(config((other.storage.url, 0.1)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0], "greater than or equal to 0.000001"),
        ([-0.2], "greater than or equal to 0.000001"),
        ([1.0], "less than 1"),
        ([0.6, 0.4], "must add up to less than 1, which is left to the run's own latents, got 1"),
    ],
)
def test_weights_that_leave_somebody_nothing_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(*(("somewhere", weight) for weight in weights))
