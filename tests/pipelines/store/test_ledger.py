"""The ledger: keys, commits, refusals, generations."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.store.ledger import Artifact, ArtifactWriter, Ledger, artifact_key
from pipelines.store.storage import Storage

IDENTITY: dict[str, Any] = {"stage": "toy", "format_version": 1, "config": {"size": 3}}


def make(ledger: Ledger, identity: dict[str, Any], contents: dict[str, bytes], version: int = 1) -> Artifact:
    key = artifact_key(identity)
    writer = ArtifactWriter("toy", key, ledger.storage("toy", key))
    for name, data in contents.items():
        writer.storage.write_bytes(name, data)
        writer.commit(name, rows=1)
    writer.finish(
        format_version=version,
        config={},
        identity=identity,
        upstream={},
        details={},
        seconds=1.0,
        code_version="0",
    )
    artifact = ledger.find("toy", key)
    assert artifact is not None
    return artifact


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Storage(str(tmp_path)))


def test_the_key_does_not_depend_on_the_order_of_fields_but_on_every_value() -> None:
    assert artifact_key({"a": 1, "b": [2]}) == artifact_key({"b": [2], "a": 1})
    assert artifact_key({"a": 1, "b": [2]}) != artifact_key({"a": 1, "b": [3]})
    assert len(artifact_key({})) == 16


def test_an_artifact_without_a_manifest_is_not_finished(ledger: Ledger) -> None:
    key = artifact_key(IDENTITY)
    ledger.storage("toy", key).write_bytes("000000.tar", b"data")
    assert ledger.find("toy", key) is None
    assert ledger.started("toy", key)


def test_a_shard_damaged_after_its_commit_is_reported_and_not_redone_silently(ledger: Ledger) -> None:
    writer = ArtifactWriter("toy", "k", ledger.storage("toy", "k"))
    writer.storage.write_bytes("000000.tar", b"whole shard")
    writer.commit("000000.tar", rows=2)
    Path(writer.storage.path("000000.tar")).write_bytes(b"whole")
    with pytest.raises(UserError, match=r"000000.tar was committed with 11 bytes but has 5"):
        writer.committed()


def test_the_first_commit_of_a_shard_stands(ledger: Ledger) -> None:
    writer = ArtifactWriter("toy", "k", ledger.storage("toy", "k"))
    writer.storage.write_bytes("a", b"one")
    first = writer.commit("a", rows=1)
    assert writer.commit("a", rows=99) == first


def test_a_file_is_written_and_committed_once(ledger: Ledger) -> None:
    writer = ArtifactWriter("toy", "k", ledger.storage("toy", "k"))
    assert not writer.is_committed("model/a")
    writer.commit_once("model/a", lambda path: path.write_bytes(b"one"))
    writer.commit_once("model/a", lambda path: path.write_bytes(b"other"))
    assert writer.is_committed("model/a")
    assert writer.storage.read_bytes("model/a") == b"one"
    assert writer.committed()["model/a"].bytes == 3


def test_a_file_that_could_not_be_written_is_not_committed(ledger: Ledger) -> None:
    writer = ArtifactWriter("toy", "k", ledger.storage("toy", "k"))

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError

    with pytest.raises(OSError):
        writer.commit_once("a", fail)
    assert not writer.storage.exists("a")
    writer.commit_once("a", lambda path: path.write_bytes(b"whole"))
    assert writer.committed()["a"].bytes == 5


def test_committing_once_looks_at_the_record_of_that_file_alone(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ArtifactWriter("toy", "k", ledger.storage("toy", "k"))
    for name in ("a", "b", "c"):
        writer.commit_once(name, lambda path: path.write_bytes(b"data"))
    read: list[str] = []
    original = Storage.read_bytes
    monkeypatch.setattr(Storage, "read_bytes", lambda self, name: read.append(name) or original(self, name))
    monkeypatch.delattr(Storage, "names")
    writer.commit_once("b", lambda path: path.write_bytes(b"again"))
    assert read == ["commits/b.json"]


def test_a_file_damaged_after_its_commit_is_not_written_again_silently(ledger: Ledger) -> None:
    writer = ArtifactWriter("toy", "k", ledger.storage("toy", "k"))
    writer.commit_once("model/a.bin", lambda path: path.write_bytes(b"whole"))
    Path(writer.storage.path("model/a.bin")).write_bytes(b"who")
    with pytest.raises(UserError, match=r"a\.bin was committed with 5 bytes but has 3: .* commits/model__a\.\* there"):
        writer.commit_once("model/a.bin", lambda path: path.write_bytes(b"whole"))


def test_a_truncated_or_missing_file_of_an_upstream_artifact_is_refused(ledger: Ledger) -> None:
    artifact = make(ledger, IDENTITY, {"000000.tar": b"0123456789", "000001.tar": b"abc"})
    artifact.check_sizes()
    Path(artifact.storage.path("000000.tar")).write_bytes(b"0123")
    with pytest.raises(UserError, match=r"000000.tar has 4 bytes but was committed with 10 .* --force toy"):
        artifact.check_sizes()
    artifact.storage.remove("000000.tar")
    with pytest.raises(UserError, match=r"000000.tar is missing"):
        artifact.check_sizes()


def test_an_artifact_of_another_stage_format_or_key_is_refused_naming_both_sides(ledger: Ledger) -> None:
    artifact = make(ledger, IDENTITY, {})
    with pytest.raises(UserError, match=r"holds toy of format 1, but toy of format 2 is needed: .*--force toy"):
        artifact.require("toy", 2)
    with pytest.raises(UserError, match=r"holds toy of format 1, but latents"):
        artifact.require("latents", 1)
    copied = Artifact("toy", "0123456789abcdef", artifact.storage)
    with pytest.raises(UserError, match=rf"says its key is {artifact.key}, but 0123456789abcdef was asked for"):
        copied.require("toy", 1)


def test_a_damaged_manifest_is_one_line(ledger: Ledger) -> None:
    artifact = make(ledger, IDENTITY, {})
    for contents, message in ((b"{", "not valid JSON"), (b"{}", "is not a manifest")):
        artifact.storage.write_bytes("manifest.json", contents)
        with pytest.raises(UserError, match=message):
            _ = Artifact("toy", artifact.key, artifact.storage).manifest


def test_a_forced_rerun_with_equal_bytes_keeps_the_old_artifact_and_heals_it(ledger: Ledger) -> None:
    old = make(ledger, IDENTITY, {"a": b"same", "b": b"also"})
    Path(old.storage.path("a")).write_bytes(b"XXXX")
    new = make(ledger, {**IDENTITY, "generation": 1}, {"a": b"same", "b": b"also"})
    assert ledger.supersede(old, new) is old
    assert old.storage.read_bytes("a") == b"same"
    assert not new.storage.exists()
    assert ledger.resolve("toy", IDENTITY)[0] == old.key


def test_a_forced_rerun_never_puts_its_log_where_another_was_committed(ledger: Ledger) -> None:
    files = {"a": b"same", "log/1": b"then", "log/2": b"equal", "log/3": b"kept"}
    old = make(ledger, IDENTITY, files)
    Path(old.storage.path("log/1")).write_bytes(b"X")
    Path(old.storage.path("log/2")).write_bytes(b"X")
    new = make(ledger, {**IDENTITY, "generation": 1}, {**files, "log/1": b"another", "log/3": b"other"})
    healed = ledger.supersede(old, new, logs=("log/",))
    assert healed == old
    assert [file.name for file in healed.manifest.files] == ["a", "log/2", "log/3"]
    healed.check_sizes()
    assert (healed.storage.read_bytes("log/2"), healed.storage.read_bytes("log/3")) == (b"equal", b"kept")
    assert not healed.storage.exists("log/1")
    assert list(ArtifactWriter("toy", old.key, old.storage).committed()) == ["a", "log/2", "log/3"]


def test_a_forced_rerun_with_other_bytes_takes_over_and_nothing_is_lost(ledger: Ledger) -> None:
    old = make(ledger, IDENTITY, {"a": b"first"})
    new = make(ledger, {**IDENTITY, "generation": 1}, {"a": b"other"})
    assert ledger.supersede(old, new) is new
    assert ledger.resolve("toy", IDENTITY)[0] == new.key
    assert old.storage.read_bytes("a") == b"first"
    newer = make(ledger, {**IDENTITY, "generation": 2}, {"a": b"third"})
    ledger.supersede(new, newer)
    assert ledger.resolve("toy", IDENTITY)[0] == newer.key
