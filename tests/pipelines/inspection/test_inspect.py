"""Facts of whatever lies at a path."""

import json
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.inspection.inspect import inspect_path
from tests.tiny_artifacts import diffusion_artifact, pairs_artifact


def test_artifact_tells_stage_rows_details_and_first_captions(tmp_path: Path) -> None:
    artifact = pairs_artifact(tmp_path, rows=(0, 7))
    facts = inspect_path(artifact.storage.url)
    assert (facts["kind"], facts["stage"], facts["key"]) == ("artifact", "pairs", "pairs")
    assert (facts["rows"], facts["shards"], facts["details"]["image_size"]) == (7, 2, 32)
    assert [sample["key"] for sample in facts["first_samples"]] == [f"00001{row:04d}" for row in range(5)]
    assert all(len(sample["captions"]) == 2 for sample in facts["first_samples"])
    json.dumps(facts)


def test_shard_tells_samples_and_files(tmp_path: Path) -> None:
    facts = inspect_path(pairs_artifact(tmp_path).storage.path("000002.tar"))
    assert (facts["kind"], facts["samples"], facts["extensions"]) == ("shard", 4, ["json", "png", "txt"])


def test_root_lists_its_artifacts(tmp_path: Path) -> None:
    pairs_artifact(tmp_path, name="one")
    pairs_artifact(tmp_path, name="two")
    facts = inspect_path(str(tmp_path))
    assert [(artifact["stage"], artifact["key"]) for artifact in facts["artifacts"]] == [
        ("pairs", "one"),
        ("pairs", "two"),
    ]


def test_model_folder_tells_parameters_without_reading_weights(tmp_path: Path) -> None:
    from ldm_core import load

    folder = diffusion_artifact(tmp_path).storage.path("model")
    facts = inspect_path(folder)
    tensors = load(folder).state_dict().values()
    assert facts["parameters"]["total"] == sum(tensor.numel() for tensor in tensors)
    assert facts["config"]["unet"]["model_channels"] == 32
    (Path(folder) / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="is not a safetensors file"):
        inspect_path(folder)


def test_damaged_shard_is_said_on_one_line(tmp_path: Path) -> None:
    shard = Path(pairs_artifact(tmp_path).storage.path("000000.tar"))
    shard.write_bytes(shard.read_bytes()[:-12_000])
    with pytest.raises(UserError, match=r"000000\.tar is truncated or damaged"):
        inspect_path(str(shard))


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "nothing at"), (".", "is neither a shard"), ("no.tar", "is missing")]
)
def test_other_paths_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect_path(str(tmp_path / name))
