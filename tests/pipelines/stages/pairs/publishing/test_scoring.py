"""Scores of models: a real (tiny) CLIP, an aesthetic head, and what is left out for their sake."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipelines.errors import UserError
from pipelines.shards.format import read_shard
from pipelines.stages.pairs.config import Scoring
from pipelines.stages.pairs.inputs import model_digests
from pipelines.stages.pairs.publishing import scoring as scoring_module
from pipelines.stages.pairs.publishing.scoring import Scorer, load_head
from pipelines.stages.pairs.shard.staged import StagedShard
from pipelines.stages.pairs.stage import STAGE
from pipelines.store.file_table import FileRecord
from pipelines.store.storage import Storage
from tests.in_this_process import map_on_one
from tests.ldm_core.metrics.conftest import clip_folder  # noqa: F401 (a fixture)
from tests.pipelines.stages.pairs.conftest import RunPairs
from tests.pipelines.stages.pairs.web_server import picture


def write_set(folder: Path, count: int) -> str:
    folder.mkdir()
    rows = []
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(picture(i * 9, (60, 40)))
        rows.append(json.dumps({"file_name": f"{i}.jpg", "text": "a red circle" if i % 2 else "blue"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return str(folder / "metadata.jsonl")


def write_head(path: Path) -> Path:
    """Write two linear layers; LAION's predictor has five."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(12, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    save_file({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}, path)
    return path


def test_scores_are_kept_and_what_scores_low_is_left_out(
    own_threads: None,
    run_pairs: RunPairs,
    tmp_path: Path,
    clip_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = write_head(tmp_path / "head.safetensors")
    source = write_set(tmp_path / "set", 12)
    scoring = {"clip": str(clip_folder), "aesthetic_head": str(head), "batch_size": 5, "workers": 1}
    whole, all_of_them = run_pairs("all", source=source, rows_per_shard=6, scoring=scoring)
    assert whole["statuses"] == {"ok": 12}
    tables = [pq.read_table(io.BytesIO(all_of_them.read_bytes(f"00000{n}.parquet"))) for n in range(2)]
    scores = [score for table in tables for score in table.column("clip_score").to_pylist()]
    samples = [s for n in range(2) for s in read_shard(Path(all_of_them.path(f"00000{n}.tar")))]
    assert [json.loads(sample["json"])["clip_score"] for sample in samples] == scores
    assert all("aesthetic_score" in json.loads(sample["json"]) for sample in samples)

    least = sorted(scores)[5]
    rules = {"clip_score": {"min": least}}
    # Another actor would compute the same scores.
    monkeypatch.setattr(scoring_module, "map_on_actors", map_on_one)
    fewer, storage = run_pairs("fewer", source=source, rows_per_shard=6, scoring=scoring, filters=rules)
    assert fewer["statuses"] == {"ok": 7, "filtered:clip_score": 5}
    kept = [s["__key__"] for n in range(2) for s in read_shard(Path(storage.path(f"00000{n}.tar")))]
    assert kept == [sample["__key__"] for sample, score in zip(samples, scores) if score >= least]


def test_a_score_is_the_cosine_of_the_embeddings(
    own_threads: None,
    tmp_path: Path,
    clip_folder: Path,  # noqa: F811
) -> None:
    from ldm_core.metrics.networks.clip import load_clip
    from pipelines.shards.format import write_shard

    samples = [("000000000", {"jpg": picture(1), "txt": b"a dog"}), ("000000001", {"jpg": picture(50), "txt": b"cats"})]
    work = Storage(str(tmp_path))
    (tmp_path / "attempt").mkdir()
    write_shard(tmp_path / "attempt" / "000000.tar", samples)
    StagedShard.record(work, 0, "attempt", [FileRecord(name="000000.tar", rows=2, bytes=1, sha256="0" * 64)], {"ok": 2})
    head = write_head(tmp_path / "head.safetensors")
    scorer = Scorer(
        scoring=Scoring(clip=str(clip_folder), aesthetic_head=str(head)), work=work, device=torch.device("cpu").type
    )
    assert scorer({"shard": 0}) == {"samples": 2}
    found = work.read_json("000000.scores")
    clip = load_clip(clip_folder)
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    for key, files in samples:
        pixels = pil_to_tensor(Image.open(io.BytesIO(files["jpg"])))[None].float() / 127.5 - 1
        image, text = clip(pixels), clip.text([files["txt"].decode()])
        assert found[key]["clip_score"] == pytest.approx(float(torch.cosine_similarity(image, text)), abs=1e-4)
        normal = nn.functional.normalize(image, dim=-1)
        assert found[key]["aesthetic_score"] == pytest.approx(float(load_head(head, "cpu")(normal)), abs=1e-4)


def test_the_key_follows_the_models(tmp_path: Path, clip_folder: Path) -> None:  # noqa: F811
    from pipelines.stages.pairs.config import PairsConfig

    source = write_set(tmp_path / "set", 2)
    head = write_head(tmp_path / "head.safetensors")

    def identity(**settings: object) -> dict[str, object]:
        scoring = {"clip": str(clip_folder), "aesthetic_head": str(head), **settings}
        return STAGE.identity(PairsConfig.model_validate({"source": source, "scoring": scoring}), 0, {})

    before = identity()
    assert identity(batch_size=32, workers=2, use_gpu=True) == before
    assert identity(batch_size=64) != before
    save_file({"weight": torch.zeros(1, 12), "bias": torch.zeros(1)}, head)
    assert identity() != before


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*: pairs.scoring.clip must be the folder of a CLIP model"):
        model_digests(Scoring(clip=str(tmp_path / "absent")))
    with pytest.raises(UserError, match=r"absent\.pth is missing"):
        model_digests(Scoring(clip=str(tmp_path), aesthetic_head=str(tmp_path / "absent.pth")))
    save_file({"a.weight": torch.zeros(3, 12), "a.bias": torch.zeros(3)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="linear layers that end in one number"):
        load_head(tmp_path / "wide.safetensors", "cpu")
    torch.save({"weight": print}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"aesthetic_head: .*evil\.pth must hold the named tensors"):
        load_head(tmp_path / "evil.pth", "cpu")
