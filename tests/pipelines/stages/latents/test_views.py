"""Several views of each picture: which, how they are cached, and how training picks one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipelines.conditions.config import MaskedImageCondition
from pipelines.conditions.kinds import kind_of
from pipelines.shards.format import decode_npy, read_shard
from pipelines.shards.order import SamplePosition
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.diffusion.config import DiffusionConfig
from pipelines.stages.diffusion.learner import DiffusionLearner, DiffusionTask
from pipelines.stages.diffusion.work import model_config
from pipelines.stages.latents.config import LatentsSettings, ViewsConfig
from pipelines.stages.latents.encoding.views import draw_view
from pipelines.stages.latents.rows import PairsRows
from pipelines.stages.latents.stage import STAGE
from pipelines.stages.pairs.artifact import decode_image
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from pipelines.training.loader.open import tensors_of
from tests.pipelines.stages.latents.in_this_process import make, reordered
from tests.shard_encoder import ShardEncoder
from tests.tiny import TINY_TEXT, TINY_UNET
from tests.tiny_artifacts import contents, first_stage_artifact, latents_config, pairs_artifact

MIRRORED = latents_config(batch_size=2, workers=1, views={})
CROPPED = latents_config(batch_size=2, workers=1, views={"count": 3, "smallest_crop": 0.5})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("views")


@pytest.fixture(scope="module")
def first_stage(root: Path) -> Artifact:
    return first_stage_artifact(root)


@pytest.fixture(scope="module")
def pairs(root: Path) -> Artifact:
    return pairs_artifact(root)


@pytest.fixture(scope="module")
def mirrored(root: Path, pairs: Artifact, first_stage: Artifact) -> Artifact:
    return make(root, "mirrored", pairs, first_stage, MIRRORED)


def samples(artifact: Artifact) -> list[dict[str, bytes]]:
    return [each for record in artifact.shards() for each in read_shard(Path(artifact.storage.path(record.name)))]


def gradient() -> np.ndarray:
    """A picture whose colours say where they are: (x, y, 0)."""
    y, x = np.mgrid[0:64, 0:64]
    return np.stack([x * 4, y * 4, np.zeros_like(x)], axis=-1).astype(np.uint8)


def test_crops_lie_within_the_picture_and_are_no_smaller_than_asked_for() -> None:
    config = ViewsConfig(count=9, smallest_crop=0.5, mirror=False)
    views = [draw_view(gradient(), view, config) for view in range(9)]
    np.testing.assert_array_equal(views[0], gradient())
    spans = [(view[32, 60, 0].astype(float) - view[32, 3, 0]) / (57 * 4) for view in views]
    assert all(0.47 < span <= 1.01 for span in spans)
    assert len({view.tobytes() for view in views}) == 9
    assert {view.shape for view in views} == {(64, 64, 3)}


def test_a_view_is_the_same_for_the_same_picture_and_another_for_another() -> None:
    config = ViewsConfig(count=2, smallest_crop=0.5)
    np.testing.assert_array_equal(draw_view(gradient(), 1, config), draw_view(gradient(), 1, config))
    other = gradient()
    other[0, 0, 2] = 1
    assert np.abs(draw_view(other, 1, config).astype(int) - draw_view(gradient(), 1, config)).max() > 4


def test_the_first_view_has_the_bytes_that_it_has_alone_and_the_second_is_the_mirror_image(
    root: Path, pairs: Artifact, first_stage: Artifact, mirrored: Artifact
) -> None:
    alone = make(root, "alone", pairs, first_stage)
    model = load_first_stage(first_stage)
    for plain, both, pair in zip(samples(alone), samples(mirrored), samples(pairs), strict=True):
        assert both.keys() - plain.keys() == {"latent.1.npy"}
        assert {name: both[name] for name in plain} == plain
        picture = torch.from_numpy(decode_image(pair["png"])[:, ::-1].copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            expected = model.encode(picture / 127.5 - 1).moments[0].numpy()
        np.testing.assert_allclose(decode_npy(both["latent.1.npy"]), expected, atol=2e-2, rtol=2e-3)
    assert mirrored.details["views"] == 2
    # The scale is that of all that is trained on.
    assert mirrored.details["scale_factor"] != alone.details["scale_factor"]


@pytest.mark.usefixtures("own_threads")
def test_what_is_known_of_a_shard_is_made_from_all_its_views(
    root: Path, pairs: Artifact, first_stage: Artifact
) -> None:
    writer = ArtifactWriter("latents", "lost", Storage(str(root)) / "latents" / "lost")
    kind_of(MIRRORED.condition).prepare(PairsRows(pairs), writer)
    encode = ShardEncoder(pairs=pairs, first_stage=first_stage, writer=writer, config=MIRRORED, device="cpu")
    record = pairs.shards()["000000.tar"]
    item = {"shard": record.name, "rows": record.rows, "sha256": record.sha256}
    encode(item)
    written = writer.storage.read_json("stats/000000.json")
    assert written["channels"]["count"] == 5 * 2 * 4 * 4
    # Whoever finds the shard without them makes them from its bytes.
    writer.storage.remove("stats/000000.json")
    writer.storage.remove("commits/stats__000000.json.json")
    encode(item)
    assert writer.storage.read_json("stats/000000.json") == written


def test_views_are_taken_over_under_other_keys_with_the_bytes_that_encoding_gives(
    root: Path, pairs: Artifact, first_stage: Artifact
) -> None:
    cropped = make(root, "cropped", pairs, first_stage, CROPPED)
    moved = reordered(root, pairs, "moved")
    taken = make(root, "taken", moved, first_stage, CROPPED, lambda: iter([(cropped.storage, cropped.files)]))
    assert contents(taken) == contents(make(root, "anew", moved, first_stage, CROPPED))
    assert {name for sample in samples(taken) for name in sample if "latent" in name} == {
        "latent.npy",
        "latent.1.npy",
        "latent.2.npy",
    }


def learner(latents: Artifact, first_stage: Artifact) -> DiffusionLearner:
    settings = DiffusionConfig.model_validate(
        {
            "unet": TINY_UNET,
            "condition": {"kind": "text", "transformer": TINY_TEXT},
            "training": {"steps": 1, "batch_size": 4, "learning_rate": 1e-3},
        }
    )
    model = model_config(settings, latents, first_stage)
    task = DiffusionTask(model=model, config=settings, seed=0, latents=latents, autoencoder=first_stage, prompts=())
    return DiffusionLearner(task, torch.device("cpu"))


def test_training_picks_a_view_by_the_position_of_the_sample(mirrored: Artifact, first_stage: Artifact) -> None:
    positions = [SamplePosition(position, 0, 0, 1) for position in range(16)]
    sample = samples(mirrored)[1]
    views = [decode_npy(sample[name]) for name in ("latent.npy", "latent.1.npy")]
    found = tensors_of(learner(mirrored, first_stage).batches, positions)["moments"].numpy()
    picked = [next(view for view in (0, 1) if (each == views[view]).all()) for each in found]
    assert set(picked) == {0, 1}
    # Whoever loads them again, in another batch and another process, after a restart.
    again = learner(mirrored, first_stage)
    for position, view in zip(positions, picked, strict=True):
        np.testing.assert_array_equal(tensors_of(again.batches, [position])["moments"].numpy()[0], views[view])


@pytest.mark.parametrize("values", [{"count": 3}, {"mirror": False}])
def test_views_that_would_be_the_same_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="views without crops are the picture and its mirror image, got count="):
        ViewsConfig.model_validate(values)


def test_conditions_that_show_the_picture_are_refused_with_views() -> None:
    sections = {
        "pairs": SimpleNamespace(resize="center_crop"),
        "latents": LatentsSettings(views=ViewsConfig()),
        "condition": MaskedImageCondition(kind="masked_image"),
    }
    with pytest.raises(ValueError, match=r"latents.views must be null with condition masked_image, .*leave views out"):
        STAGE.check(sections)
