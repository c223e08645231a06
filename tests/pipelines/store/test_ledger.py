"""The ledger: keys, commits, refusals, generations."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.store import commits
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact, Ledger, artifact_key
from pipelines.store.storage import Storage

FACTS: dict[str, Any] = {
    "format_version": 1,
    "config": {},
    "identity": {},
    "upstream": {},
    "details": {},
    "seconds": 1.0,
    "code_version": "0",
}
IDENTITY: dict[str, Any] = {"stage": "toy", "format_version": 1, "config": {"size": 3}}


def make(ledger: Ledger, identity: dict[str, Any], contents: dict[str, bytes], version: int = 1) -> Artifact:
    key = artifact_key(identity)
    writer = ArtifactWriter("toy", key, ledger.storage("toy", key))
    for name, data in contents.items():
        writer.storage.write_bytes(name, data)
        writer.commit(name, rows=1)
    writer.finish(**{**FACTS, "identity": identity, "format_version": version})
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
    artifact = make(ledger, IDENTITY, {"a": b"x"})
    with pytest.raises(UserError, match=r"holds toy of format 1, but toy of format 2 is needed: .*--force toy"):
        artifact.require("toy", 2)
    with pytest.raises(UserError, match=r"holds toy of format 1, but latents"):
        artifact.require("latents", 1)
    copied = Artifact("toy", "0123456789abcdef", artifact.storage)
    with pytest.raises(UserError, match=rf"says its key is {artifact.key}, but 0123456789abcdef was asked for"):
        copied.require("toy", 1)


def test_a_damaged_manifest_is_one_line(ledger: Ledger) -> None:
    artifact = make(ledger, IDENTITY, {"a": b"x"})
    refused = (
        (b"{", "not valid JSON"),
        (b"{}", "is not a manifest"),
        (b'{"stage": "pairs", "files": []}', r"was made by ldm 0\.1: .* choose another --root"),
    )
    for contents, message in refused:
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
    assert healed.files.names == ["a", "log/2", "log/3"]
    healed.check_sizes()
    assert (healed.storage.read_bytes("log/2"), healed.storage.read_bytes("log/3")) == (b"equal", b"kept")
    assert not healed.storage.exists("log/1")


def test_a_forced_rerun_with_other_bytes_takes_over_and_nothing_is_lost(ledger: Ledger) -> None:
    old = make(ledger, IDENTITY, {"a": b"first"})
    new = make(ledger, {**IDENTITY, "generation": 1}, {"a": b"other"})
    assert ledger.supersede(old, new) is new
    assert ledger.resolve("toy", IDENTITY)[0] == new.key
    assert old.storage.read_bytes("a") == b"first"
    newer = make(ledger, {**IDENTITY, "generation": 2}, {"a": b"third"})
    ledger.supersede(new, newer)
    assert ledger.resolve("toy", IDENTITY)[0] == newer.key


def test_the_files_of_an_artifact_are_a_table_that_its_manifest_names(ledger: Ledger) -> None:
    artifact = make(ledger, IDENTITY, {"000001.tar": b"abc", "000000.tar": b"0123456789", "model/a": b"x"})
    assert artifact.files.names == ["000000.tar", "000001.tar", "model/a"]
    assert (artifact.manifest.files, artifact.manifest.rows, artifact.manifest.bytes) == (3, 3, 14)
    assert artifact.shards().names == ["000000.tar", "000001.tar"]
    assert not artifact.storage.exists("commits")
    Path(artifact.storage.path(artifact.manifest.table)).write_bytes(b"PAR1 damaged")
    with pytest.raises(UserError, match=r"files-[0-9a-f]+\.parquet is not a table of files"):
        _ = Artifact("toy", artifact.key, artifact.storage).files


def test_what_is_sent_to_a_worker_does_not_grow_with_the_number_of_files(ledger: Ledger) -> None:
    artifact = make(ledger, IDENTITY, {f"{number:06d}.tar": b"data" for number in range(300)})
    assert len(artifact.files) == 300
    sent = pickle.dumps(artifact)
    assert len(sent) < 3000
    assert pickle.loads(sent).manifest == artifact.manifest
    writer = ArtifactWriter("toy", "k", ledger.storage("toy", "k"))
    writer.gather(artifact.files)
    assert len(pickle.dumps(writer)) < 1000


def test_a_worker_reads_the_files_that_its_driver_saw_though_samples_were_added_since(ledger: Ledger) -> None:
    artifact = make(ledger, IDENTITY, {"000000.tar": b"data"})
    _ = artifact.manifest
    sent = pickle.dumps(artifact)
    writer = ArtifactWriter("toy", artifact.key, artifact.storage, grows=True)
    writer.storage.write_bytes("000001.tar", b"more")
    writer.commit("000001.tar", rows=1)
    writer.finish(**{**FACTS, "identity": IDENTITY, "details": {"additions": 1}})
    assert pickle.loads(sent).files.names == ["000000.tar"]
    grown = ledger.find("toy", artifact.key)
    assert grown is not None
    assert grown.files.names == ["000000.tar", "000001.tar"]
    assert grown.reference == f"{artifact.key}+1"
    assert writer.is_committed("000000.tar")


def test_records_that_the_driver_gathered_are_not_read_again_one_by_one(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "_RECORDS_A_SEGMENT", 20)
    writer = ArtifactWriter("toy", "k", ledger.storage("toy", "k"))
    for number in range(50):
        writer.storage.write_bytes(f"model/{number:06d}.tar", bytes(number))
        writer.gather([writer.commit(f"model/{number:06d}.tar", rows=number)])
    read: list[str] = []
    original = Storage.read_json
    monkeypatch.setattr(Storage, "read_json", lambda self, name: read.append(name) or original(self, name))
    table = ArtifactWriter("toy", "k", ledger.storage("toy", "k")).committed()
    assert [(record.rows, record.bytes) for record in table] == [(number, number) for number in range(50)]
    # The driver ended with ten of them in its memory.
    assert sorted(read) == [f"model__{number:06d}.tar.json" for number in range(40, 50)]


def test_records_read_one_by_one_become_a_segment_and_many_segments_one(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "_WORTH_A_SEGMENT", 10)
    monkeypatch.setattr(commits, "_MOST_SEGMENTS", 3)
    writer = ArtifactWriter("toy", "k", ledger.storage("toy", "k"))
    for number in range(60):
        writer.storage.write_bytes(f"{number:06d}.tar", b"data")
        writer.commit(f"{number:06d}.tar", rows=1)
        if number % 12 == 11:
            assert len(writer.committed()) == number + 1
            assert len((writer.storage / commits.SEGMENTS).names("*.parquet")) <= 4
    assert len(writer.committed()) == 60


def test_a_root_of_another_version_is_refused_with_what_to_do(ledger: Ledger) -> None:
    ledger.require_version(["toy"])
    artifact = make(ledger, IDENTITY, {"a": b"x"})
    # A root that was copied in part, and folders of other things with a stage's name.
    (ledger.root / "toy" / "pictures").write_bytes("a.jpg", b"x")
    ledger.require_version(["toy"])
    artifact.storage.write_json("manifest.json", {"stage": "toy", "files": []})
    with pytest.raises(UserError, match=r"was made by ldm 0\.1: .*choose another --root"):
        ledger.require_version(["toy"])
    artifact.storage.remove("manifest.json")
    artifact.storage.write_bytes("commits/a.json", b"{}")
    with pytest.raises(UserError, match=r"was begun by ldm 0\.1: .*choose another --root"):
        ledger.require_version(["toy"])
    ledger.mark_version()
    ledger.require_version(["toy"])
    ledger.root.write_json("ledger.json", {"version": 3})
    with pytest.raises(UserError, match=r"is of ledger version 3, but this is ldm of version 2: use the ldm that"):
        ledger.require_version(["toy"])


def test_a_damaged_file_of_an_artifact_that_grows_is_not_to_be_removed(ledger: Ledger) -> None:
    artifact = make(ledger, IDENTITY, {"000000.tar": b"data"})
    artifact.storage.write_bytes("000000.tar", b"dat")
    with pytest.raises(UserError, match=r"was damaged afterwards; rebuild it with `ldm run RECIPE --force toy`"):
        ArtifactWriter("toy", artifact.key, artifact.storage, grows=True).committed()


def test_an_artifact_without_files_is_not_finished(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="has no committed file"):
        make(ledger, IDENTITY, {})


def test_contents_are_of_the_files_that_are_no_logs(ledger: Ledger) -> None:
    def content(key: str, log: bytes) -> str:
        writer = ArtifactWriter("toy", key, ledger.storage("toy", key))
        for name, data in (("a", b"same"), ("log/1", log)):
            writer.commit_once(name, lambda path, data=data: path.write_bytes(data))  # type: ignore[misc]
        return writer.finish(**FACTS, logs=("log/",)).content

    assert content("k", b"one") == content("l", b"two")
