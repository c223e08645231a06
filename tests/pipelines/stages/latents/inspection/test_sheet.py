"""The picture of latents: originals beside what their latents decode to, above the charts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_core.images import to_uint8
from pipelines.drawing.grids import GAP, mounted
from pipelines.errors import UserError
from pipelines.inspection.inspect import write_contact_sheet
from pipelines.shards.format import decode_npy, read_shard
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.latents.inspection.sheet import CELL_PIXELS, COLUMNS
from pipelines.stages.pairs.artifact import decode_image
from pipelines.store.ledger import Artifact
from tests.pipelines.stages.latents.inspection.encoded import latents, pictures
from tests.tiny_artifacts import first_stage_artifact

WIDTH = COLUMNS * (CELL_PIXELS + GAP) + GAP


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return latents(tmp_path, pictures(tmp_path), first_stage_artifact(tmp_path))


def drawn(url: str, folder: Path) -> np.ndarray:
    write_contact_sheet(url, folder / "sheet.png")
    return np.asarray(Image.open(folder / "sheet.png"))


def cell(sheet: np.ndarray, number: int) -> np.ndarray:
    """Return a picture of the first row."""
    x = GAP + number * (CELL_PIXELS + GAP)
    return sheet[GAP : GAP + CELL_PIXELS, x : x + CELL_PIXELS]


def first(artifact: Artifact, stage: str, shard: str = "000000.tar") -> dict[str, bytes]:
    found = artifact if stage == "latents" else artifact.upstream(stage)
    assert found is not None
    return next(iter(read_shard(Path(found.storage.path(shard)))))


def original(artifact: Artifact, shard: str = "000000.tar") -> np.ndarray:
    return mounted(Image.fromarray(decode_image(first(artifact, "pairs", shard)["png"])), CELL_PIXELS)


def decoded(artifact: Artifact) -> np.ndarray:
    autoencoder = artifact.upstream("autoencoder")
    assert autoencoder is not None
    mean = torch.from_numpy(decode_npy(first(artifact, "latents")["latent.npy"])[None, 0]).float()
    pixels = to_uint8(load_first_stage(autoencoder).decode(mean).clamp(-1, 1))[0].permute(1, 2, 0).numpy()
    return mounted(Image.fromarray(pixels), CELL_PIXELS)


def test_each_original_stands_beside_what_its_latent_decodes_to(artifact: Artifact, tmp_path: Path) -> None:
    sheet = drawn(artifact.storage.url, tmp_path)
    assert sheet.shape[1] == WIDTH
    np.testing.assert_array_equal(cell(sheet, 0), original(artifact))
    np.testing.assert_array_equal(cell(sheet, 1), decoded(artifact))
    blue = (sheet[-500:].astype(int) - sheet[-500:].astype(int)[..., :1])[..., 2] > 100
    assert blue.any(axis=0).mean() > 0.3, "below them stand the charts' bars"


def test_of_one_shard_its_own_samples_are_drawn(artifact: Artifact, tmp_path: Path) -> None:
    sheet = drawn(f"{artifact.storage.url}/000002.tar", tmp_path)
    np.testing.assert_array_equal(cell(sheet, 0), original(artifact, "000002.tar"))
    with pytest.raises(UserError, match=r"000009.tar is missing, or not of that artifact"):
        drawn(f"{artifact.storage.url}/000009.tar", tmp_path)


def test_what_is_gone_is_left_out(artifact: Artifact, tmp_path: Path) -> None:
    before, autoencoder, pairs = decoded(artifact), artifact.upstream("autoencoder"), artifact.upstream("pairs")
    assert autoencoder is not None
    assert pairs is not None
    shutil.rmtree(pairs.storage.path())
    np.testing.assert_array_equal(cell(drawn(artifact.storage.url, tmp_path), 0), before)
    shutil.rmtree(autoencoder.storage.path())
    alone = drawn(artifact.storage.url, tmp_path)
    assert alone.shape[1] == WIDTH, "the charts need neither"


def test_latents_without_samples_are_refused(tmp_path: Path) -> None:
    empty = latents(tmp_path, pictures(tmp_path, rows=(0,)), first_stage_artifact(tmp_path))
    with pytest.raises(UserError, match="has no samples with pictures"):
        drawn(empty.storage.url, tmp_path)
