"""Evaluation from end to end, by real actors on a tiny model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import UserError
from pipelines.stages.diffusion.artifact import load_model
from pipelines.stages.diffusion.config import SamplingConfig
from pipelines.stages.diffusion.sampling import sample_prompts
from pipelines.stages.evaluate.batch import read_images
from pipelines.stages.evaluate.config import EvaluateConfig
from pipelines.stages.evaluate.stage import STAGE
from pipelines.stages.pairs.artifact import load_captioned_pictures
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact, artifact_key
from pipelines.store.storage import Storage
from tests.tiny_artifacts import contents, diffusion_artifact, first_caption, pairs_artifact, run_stage

SAMPLING = SamplingConfig(num_steps=3, batch_size=3)
SAMPLES = [f"samples/{number:06d}.tar" for number in range(3)]
FILES = {"grid.png", "training_grid.png", "held_out_grid.png", "scores.json", *SAMPLES}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def upstream(root: Path) -> dict[str, Artifact]:
    return {"pairs": pairs_artifact(root, rows=(90, 0, 60)), "diffusion": diffusion_artifact(root)}


@pytest.fixture(scope="module")
def config(root: Path) -> EvaluateConfig:
    rows = [{"prompt": f"{colour} circle", "colour": colour, "shape": "circle"} for colour in ("red", "blue")]
    (root / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return EvaluateConfig(
        prompts=("plain",),
        prompts_file=str(root / "prompts.jsonl"),
        training_captions=2,
        sampling=SAMPLING,
        detector="shapes",
        workers=1,
    )


@pytest.fixture(scope="module")
def evaluation(ray_cluster: None, root: Path, upstream: dict[str, Artifact], config: EvaluateConfig) -> Artifact:
    return run_stage(STAGE, config, root, upstream, seed=7)


def test_every_prompt_and_caption_of_the_data_set_has_its_picture(
    evaluation: Artifact, upstream: dict[str, Artifact]
) -> None:
    details = evaluation.details
    assert contents(evaluation).keys() == FILES
    assert details["prompts"] == ["plain", "red circle", "blue circle"]
    assert (details["samples"], len(details["training_captions"])) == (7, 2)
    pairs = upstream["pairs"]
    held_out = load_captioned_pictures(pairs, held_out_places(pairs), first_caption)
    assert details["held_out_captions"] == [picture.caption for picture in held_out]
    images = read_images(evaluation.storage, SAMPLES)
    model, reader = load_model(upstream["diffusion"])
    captions = details["training_captions"] + details["held_out_captions"]
    alone = sample_prompts(model, reader, captions, range(10, 14), SAMPLING)
    assert np.abs(images[3:].astype(int) - alone).max() <= 1
    assert images.std() > 1


def test_scores_are_those_of_the_prompts_that_say_what_to_expect(evaluation: Artifact) -> None:
    scores = evaluation.storage.read_json("scores.json")["alignment"]
    assert scores["samples"] == evaluation.details["alignment_samples"] == 2
    assert scores["accuracy"] == evaluation.details["alignment_accuracy"]
    assert [item["index"] for item in scores["items"]] == [1, 2]


def test_number_of_workers_changes_neither_bytes_nor_key_and_committed_samples_stay(
    evaluation: Artifact, root: Path, upstream: dict[str, Artifact], config: EvaluateConfig
) -> None:
    other = config.model_copy(update={"workers": 2})
    keys = {name: artifact.key for name, artifact in upstream.items()}
    assert artifact_key(STAGE.identity(other, 7, keys)) == artifact_key(STAGE.identity(config, 7, keys))
    assert artifact_key(STAGE.identity(config, 8, keys)) != artifact_key(STAGE.identity(config, 7, keys))
    # What a kill leaves behind: one batch committed, the other written but not committed.
    left = root / "evaluate" / "again"
    evaluation.storage.copy("samples/000000.tar", Storage(str(left)))
    rows = evaluation.files["samples/000000.tar"].rows
    ArtifactWriter("evaluate", "again", Storage(str(left))).commit("samples/000000.tar", rows=rows)
    (left / "samples" / "000001.tar").write_bytes(b"cut off")
    before = (left / "samples" / "000000.tar").stat().st_mtime_ns
    again = run_stage(STAGE, other, root, upstream, key="again", seed=7)
    assert contents(again) == contents(evaluation)
    assert (left / "samples" / "000000.tar").stat().st_mtime_ns == before


def test_detector_without_expectations_is_refused_before_anything_is_sampled(
    tmp_path: Path, upstream: dict[str, Artifact]
) -> None:
    with pytest.raises(UserError, match="needs prompts that say what to expect"):
        run_stage(STAGE, EvaluateConfig(prompts=("plain",), detector="shapes"), tmp_path, upstream)


def test_picture_depends_on_its_prompt_and_seed_alone(upstream: dict[str, Artifact]) -> None:
    model, reader = load_model(upstream["diffusion"])
    together = sample_prompts(model, reader, ["red", "", "large café"], [3, 4, 5], SAMPLING)
    assert (together.shape, together.dtype) == ((3, 32, 32, 3), np.uint8)
    alone = sample_prompts(model, reader, ["large café"], [5], SAMPLING)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1
    other_seed = sample_prompts(model, reader, ["large café"], [6], SAMPLING)
    other_prompt = sample_prompts(model, reader, ["red"], [5], SAMPLING)
    assert min(np.abs(alone.astype(int) - other).mean() for other in (other_seed, other_prompt)) > 0.01


def test_batches_are_cut_as_configured(upstream: dict[str, Artifact]) -> None:
    model, reader = load_model(upstream["diffusion"])
    sizes = []
    model.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    sample_prompts(model, reader, ["red"] * 4, range(4), SAMPLING)
    # Both halves of guidance share the latents; DDIM takes a step more where 1000 is not a multiple.
    steps = math.ceil(1000 / (1000 // SAMPLING.num_steps))
    assert sizes == [3] * steps + [1] * steps


def test_one_seed_a_prompt(upstream: dict[str, Artifact]) -> None:
    model, reader = load_model(upstream["diffusion"])
    with pytest.raises(ValueError, match="got 2 prompts and 1 seeds"):
        sample_prompts(model, reader, ["a", "b"], [1], SAMPLING)
