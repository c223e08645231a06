"""Damage is found and named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import UserError
from pipelines.inspection.verify import verify_path, verify_shard
from pipelines.shards.format import encode_npy, write_shard
from pipelines.store.ledger import Artifact
from tests.tiny_artifacts import latents_artifact, pairs_artifact


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-12_000])


def flip_a_bit(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)


def drop_a_sample(shard: Path) -> None:
    write_shard(shard, [("000020000", {"txt": b"only one"})])


def test_whole_artifact_has_no_problems(tmp_path: Path) -> None:
    artifact = pairs_artifact(tmp_path)
    (report,) = verify_path(artifact.storage.url)
    assert report.ok
    assert (report.files, report.rows, report.bytes) == (len(artifact.files), 9, artifact.manifest.bytes)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, ["bytes instead of", "truncated or damaged after", "samples instead of 4"]),
        (flip_a_bit, ["sha256"]),
        (drop_a_sample, ["bytes instead of", "1 samples instead of 4"]),
        (Path.unlink, ["missing"]),
    ],
)
def test_damaged_shard_is_named_with_what_is_wrong(
    tmp_path: Path, damage: Callable[[Path], None], expected: list[str]
) -> None:
    artifact = pairs_artifact(tmp_path)
    damage(Path(artifact.storage.path("000002.tar")))
    (report,) = verify_path(artifact.storage.url)
    assert not report.ok
    assert all(problem.startswith("000002.tar: ") for problem in report.problems)
    for words in expected:
        assert any(words in problem for problem in report.problems), report.problems


def test_members_of_a_single_shard_are_read(tmp_path: Path) -> None:
    good = {"latent.npy": encode_npy(np.zeros((2, 4, 8, 8), np.float16)), "json": b"{}", "txt": b"red"}
    write_shard(tmp_path / "good.tar", [("a", good)])
    assert verify_shard(str(tmp_path / "good.tar")).ok
    pickled = np.array([{"an": "object"}])
    np.save(tmp_path / "pickled.npy", pickled)
    bad = {
        "latent.npy": good["latent.npy"][:-1],
        "tokens.npy": (tmp_path / "pickled.npy").read_bytes(),
        "json": b"{",
        "txt": b"\xff",
        "png": b"no picture",
    }
    write_shard(tmp_path / "bad.tar", [("a", bad), ("b", good)])
    report = verify_shard(str(tmp_path / "bad.tar"))
    assert report.rows == 2
    assert [problem.split(" is unreadable")[0] for problem in report.problems] == [
        f"bad.tar: a.{extension}" for extension in sorted(bad)
    ]


def test_many_problems_are_counted_rather_than_listed(tmp_path: Path) -> None:
    write_shard(tmp_path / "bad.tar", [(f"{number:03d}", {"json": b"{"}) for number in range(100)])
    problems = verify_shard(str(tmp_path / "bad.tar")).problems
    assert len(problems) == 6
    assert problems[-1] == "bad.tar: and 95 more problems"


def test_root_is_verified_artifact_by_artifact(tmp_path: Path) -> None:
    pairs_artifact(tmp_path, name="one")
    truncate(Path(pairs_artifact(tmp_path, name="two").storage.path("000000.tar")))
    assert [report.ok for report in verify_path(str(tmp_path))] == [True, False]


def test_what_cannot_be_verified_is_said_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing at"):
        verify_path(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere\.tar is missing"):
        verify_path(str(tmp_path / "nowhere.tar"))
    with pytest.raises(UserError, match="neither a shard, nor a finished artifact"):
        verify_path(str(tmp_path))


@pytest.fixture
def latents(tmp_path: Path) -> Artifact:
    return latents_artifact(tmp_path, "0" * 64, rows=(6, 0, 6))


def test_latents_are_held_against_their_indexes(latents: Artifact) -> None:
    (report,) = verify_path(latents.storage.url)
    assert report.ok
    assert (report.files, report.rows) == (len(latents.files), 12)


def test_the_sample_that_a_flipped_bit_lies_in_is_named(latents: Artifact) -> None:
    shard = Path(latents.storage.path("000002.tar"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"000020003.latent.npy") + 700] ^= 1
    shard.write_bytes(data)
    (report,) = verify_path(latents.storage.url)
    digest, sample = report.problems
    assert digest.startswith("000002.tar: sha256 ")
    assert sample == "000002.tar: 000020003.latent.npy is not what its index says"


def test_shards_in_each_others_place_are_not_what_their_indexes_say(latents: Artifact) -> None:
    first, second = (Path(latents.storage.path(name)) for name in ("000000.tar", "000002.tar"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    (report,) = verify_path(latents.storage.url)
    assert "000000.tar: sample 000020000 in the place of 000000000" in report.problems
    assert "000000.tar: and 1 more problems" in report.problems


def cut_in_half(index: Path) -> None:
    index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])


def spoil_the_json(index: Path) -> None:
    index.write_bytes(index.read_bytes().replace(b'{"captions"', b'["captions"', 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "index/000000.arrow: missing"),
        (cut_in_half, "000000.tar: its index index/000000.arrow cannot"),
        (spoil_the_json, "000000.tar: the json of 000000000 in its index index/000000.arrow is unreadable"),
    ],
)
def test_a_damaged_index_is_named(latents: Artifact, damage: Callable[[Path], None], message: str) -> None:
    damage(Path(latents.storage.path("index/000000.arrow")))
    (report,) = verify_path(latents.storage.url)
    assert any(problem.startswith(message) for problem in report.problems), report.problems
    assert all("index/000000.arrow" in problem for problem in report.problems)
