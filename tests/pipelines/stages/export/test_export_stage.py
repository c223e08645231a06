"""The exported model, as other programs load it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import UserError
from pipelines.stages.diffusion.artifact import load_model
from pipelines.stages.export.config import ExportConfig
from pipelines.stages.export.stage import STAGE
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.tiny_artifacts import contents, diffusion_artifact, run_stage


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def diffusion(root: Path) -> Artifact:
    return diffusion_artifact(root)


@pytest.fixture(scope="module")
def exported(root: Path, diffusion: Artifact) -> Artifact:
    return run_stage(STAGE, ExportConfig(), root, {"diffusion": diffusion})


def test_our_layout_loads_with_the_same_weights(exported: Artifact, diffusion: Artifact) -> None:
    import ldm_core

    weights = ldm_core.load(exported.storage.url).state_dict()
    trained = load_model(diffusion)[0].state_dict()
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.items())
    assert exported.details["parameters"]["total"] == sum(p.numel() for p in load_model(diffusion)[0].parameters())


def test_diffusers_loads_its_layout_and_draws_the_same_picture(exported: Artifact, diffusion: Artifact) -> None:
    diffusers = pytest.importorskip("diffusers")
    from ldm_core.samplers import initial_noise

    assert exported.details["layouts"] == ["ldm", "diffusers"]
    pipeline = diffusers.LDMTextToImagePipeline.from_pretrained(exported.storage.path("diffusers"))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        ["red circle"],
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=initial_noise([5], (4, 4, 4)),
        output_type="np",
    ).images
    model, prompts = load_model(diffusion)
    ours = model.sample(
        prompts.inputs(["red circle"]),
        unconditional=prompts.unconditional(),
        seeds=[5],
        num_steps=4,
        guidance_scale=3.0,
    )
    difference = np.abs(theirs - (ours.permute(0, 2, 3, 1).numpy() + 1) / 2).max()
    assert difference <= 1 / 255


def test_killed_export_goes_on_and_ends_with_the_same_bytes(
    exported: Artifact, root: Path, diffusion: Artifact
) -> None:
    left = root / "export" / "killed"
    exported.storage.copy("config.json", Storage(str(left)))
    ArtifactWriter("export", "killed", Storage(str(left))).commit("config.json")
    (left / "model.safetensors").write_bytes(b"cut off")
    again = run_stage(STAGE, ExportConfig(), root, {"diffusion": diffusion}, key="killed")
    assert contents(again) == contents(exported)


def test_diffusers_layout_can_be_left_out(tmp_path: Path, diffusion: Artifact) -> None:
    artifact = run_stage(STAGE, ExportConfig(diffusers=False), tmp_path, {"diffusion": diffusion})
    assert contents(artifact).keys() == {"model.safetensors", "config.json", "vocab.txt"}
    assert "diffusers_skipped" not in artifact.details


def test_model_without_counterpart_is_exported_in_our_layout_with_the_reason(tmp_path: Path) -> None:
    upstream = {"diffusion": diffusion_artifact(tmp_path, max_length=8)}
    artifact = run_stage(STAGE, ExportConfig(), tmp_path, upstream)
    assert artifact.details["layouts"] == ["ldm"]
    assert "77 tokens" in artifact.details["diffusers_skipped"]
    assert not any(name.startswith("diffusers") for name in contents(artifact))
    with pytest.raises(UserError, match=r"no diffusers layout of this model: .*set export\.diffusers=false"):
        run_stage(STAGE, ExportConfig(diffusers=True), tmp_path, upstream, key="insisted")


def test_damaged_model_is_refused_on_one_line(tmp_path: Path) -> None:
    diffusion = diffusion_artifact(tmp_path)
    weights = Path(diffusion.storage.path("model/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors must be a whole safetensors file") as caught:
        run_stage(STAGE, ExportConfig(), tmp_path, {"diffusion": diffusion})
    assert "\n" not in str(caught.value)
