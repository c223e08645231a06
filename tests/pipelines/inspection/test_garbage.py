"""What `ldm gc` removes, and what it never does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.errors import MisuseError, UserError
from pipelines.inspection import garbage
from pipelines.inspection.catalogue import read_catalogue
from pipelines.inspection.garbage import Findings, delete, find_garbage
from pipelines.run.results import StageRow
from pipelines.run.runs import RUNS, begin
from pipelines.shards.node_cache import NodeCache, cache_folder
from pipelines.store.ledger import LOCKS, SUPERSEDED, Ledger, artifact_key
from pipelines.store.lock import exclusive
from pipelines.store.storage import Storage
from tests.pipelines.inspection.rooted import DAY_S, a_run, age, begun, finished, make_root, objects, superseded
from tests.pipelines.store.s3 import BUCKET, S3
from tests.s3 import fast_s3

WEEK_S = 7 * DAY_S
HOLDER = """
import sys
from pipelines.store.lock import exclusive
from pipelines.store.storage import Storage
with exclusive(Storage(sys.argv[1]), 3.0):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["local", "s3"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    if request.param == "local":
        return make_root(str(tmp_path / "root"))
    request.getfixturevalue("s3")
    return make_root(f"s3://{BUCKET}/gc-{uuid.uuid4().hex}")


@pytest.fixture
def local(tmp_path: Path) -> Ledger:
    return make_root(str(tmp_path / "root"))


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that no other process writes to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def holder() -> Iterator[Callable[[Storage], subprocess.Popen[str]]]:
    """Starts a process that holds a lock."""
    processes: list[subprocess.Popen[str]] = []

    def start(place: Storage) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, place.url]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def places(found: Findings) -> dict[str, str]:
    """Return what may go by place, without locks."""
    return {each.place: each.kind for each in found.garbage if each.kind != "lock"}


def reasons(found: Findings) -> dict[str, str]:
    return {each.place: each.why for each in found.kept}


def test_a_superseded_artifact_goes_and_its_key_still_stands_for_the_one_that_replaced_it(ledger: Ledger) -> None:
    identity = {"stage": "pairs", "config": {"size": 3}}
    old = superseded(ledger, "pairs", artifact_key(identity))
    current, _ = ledger.resolve("pairs", identity)
    finished(ledger, "pairs", current)
    found = find_garbage(ledger.root, WEEK_S)
    assert places(found) == {f"pairs/{old.key}": "superseded"}
    assert sum(each.bytes for each in found.garbage) == 200
    assert delete(ledger.root, found) == []
    assert list(old.storage.files_below()) == [SUPERSEDED]
    assert ledger.resolve("pairs", identity)[0] == current
    assert ledger.find("pairs", current) is not None
    assert not find_garbage(ledger.root, WEEK_S).garbage
    assert {each.place: each.condition for each in read_catalogue(ledger.root).artifacts} == {
        f"pairs/{old.key}": "deleted",
        f"pairs/{current}": "finished",
    }


def test_a_superseded_artifact_that_a_run_stands_on_stays_until_that_is_forgotten(ledger: Ledger) -> None:
    old = superseded(ledger, "pairs", "aa")
    run = a_run(ledger, old)
    found = find_garbage(ledger.root, WEEK_S)
    assert places(found) == {}
    assert reasons(found) == {"pairs/aa": f"superseded, but run {run} stands on it (--forget {run})"}
    found = find_garbage(ledger.root, WEEK_S, [run])
    assert places(found) == {f"{RUNS}/{run}": "run", "pairs/aa": "superseded"}
    assert delete(ledger.root, found) == []
    assert objects(ledger.root) == {"ledger.json", f"pairs/aa/{SUPERSEDED}"}


def test_what_a_finished_artifact_was_made_from_stays_and_goes_with_it(ledger: Ledger) -> None:
    superseded(ledger, "pairs", "aa")
    superseded(ledger, "pairs", "bb")
    finished(ledger, "latents", "cc", {"pairs": "aa+1"})
    superseded(ledger, "latents", "dd", {"pairs": "bb"})
    found = find_garbage(ledger.root, WEEK_S)
    assert places(found) == {"pairs/bb": "superseded", "latents/dd": "superseded"}
    assert reasons(found) == {"pairs/aa": "superseded, but latents cc was made from it"}
    delete(ledger.root, found)
    assert {each.place for each in read_catalogue(ledger.root).artifacts if each.manifest} == {"pairs/aa", "latents/cc"}


def test_latents_that_a_model_was_trained_on_beside_its_own_stay(ledger: Ledger) -> None:
    superseded(ledger, "latents", "aa")
    mix = [{"stage": "latents", "key": "aa"}, {"stage": "latents", "key": "of-another-root"}]
    finished(ledger, "diffusion", "bb", {}, {"mix": mix})
    found = find_garbage(ledger.root, WEEK_S)
    assert reasons(found) == {"latents/aa": "superseded, but diffusion bb was made from it"}


def test_unfinished_work_goes_unless_a_run_can_go_on_with_it(ledger: Ledger) -> None:
    begun(ledger, "pairs", "aa")
    run = a_run(ledger, begins=("pairs", "aa"))
    begun(ledger, "pairs", "bb")
    found = find_garbage(ledger.root, WEEK_S)
    assert places(found) == {"pairs/bb": "unfinished"}
    assert reasons(found) == {"pairs/aa": f"run {run} can go on with it (--forget {run})"}
    assert delete(ledger.root, found) == []
    assert not ledger.storage("pairs", "bb").exists()
    assert len(begun(ledger, "pairs", "aa").committed()) == 2
    assert places(find_garbage(ledger.root, 0.0)) == {"pairs/aa": "unfinished"}


def test_unfinished_work_goes_when_nobody_has_touched_it_for_long(local: Ledger) -> None:
    begun(local, "pairs", "aa")
    a_run(local, begins=("pairs", "aa"))
    age(Path(local.storage("pairs", "aa").path()), 6)
    assert places(find_garbage(local.root, WEEK_S)) == {}
    age(Path(local.storage("pairs", "aa").path()), 8)
    (found,) = (each for each in find_garbage(local.root, WEEK_S).garbage if each.kind == "unfinished")
    assert found.why == "unfinished, and untouched for 8.0 days"


def test_work_that_went_on_since_it_was_looked_at_stays(local: Ledger) -> None:
    writer = begun(local, "pairs", "aa")
    age(Path(writer.storage.path()), 8)
    found = find_garbage(local.root, WEEK_S)
    writer.storage.write_bytes("000002.tar", b"new")
    (left,) = delete(local.root, found)
    assert (left.place, left.why) == ("pairs/aa", "it has changed since it was looked at")
    assert len(writer.committed()) == 2


def test_what_is_beside_a_finished_artifact_goes(ledger: Ledger) -> None:
    artifact = finished(ledger, "pairs", "aa")
    run = a_run(ledger, artifact)
    whole = objects(ledger.root)
    for name in ("work/000000.tar", "commits/000009.tar.json"):
        artifact.storage.write_bytes(name, b"left")
    found = find_garbage(ledger.root, WEEK_S)
    assert places(found) == {"pairs/aa": "leftovers"}
    assert delete(ledger.root, found) == []
    assert objects(ledger.root) == whole
    artifact.storage.write_bytes("work/retry-2.rows", b"left")
    retry = a_run(ledger, begins=("pairs", "aa"))
    assert reasons(find_garbage(ledger.root, WEEK_S)) == {
        "pairs/aa": f"run {retry} can go on with it (--forget {retry})"
    }
    assert run != retry


def test_tables_that_the_manifest_does_not_name_go_after_a_day(local: Ledger) -> None:
    artifact = finished(local, "pairs", "aa")
    folder = Path(artifact.storage.path())
    (folder / "files-0123456789abcdef.parquet").write_bytes(b"old")
    assert places(find_garbage(local.root, WEEK_S)) == {}
    age(folder, 2)
    with begin(local.root, "small", "", "digest") as run:
        run.record(StageRow("pairs", "cached", artifact.key), artifact)
        # It may have read the manifest that named it.
        assert places(find_garbage(local.root, WEEK_S)) == {}
    found = find_garbage(local.root, WEEK_S)
    assert places(found) == {"pairs/aa": "table"}
    delete(local.root, found)
    assert [path.name for path in folder.glob("files-*")] == [artifact.manifest.table]
    assert len(artifact.files) == 2


def test_temporary_files_of_killed_writers_go_after_a_day(local: Ledger) -> None:
    folder = Path(finished(local, "pairs", "aa").storage.path())
    for place in (folder, Path(local.root.path())):
        (place / f".000000.tar.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
        # Another program's.
        (place / ".mine.tmp").write_bytes(b"mine")
    assert places(find_garbage(local.root, WEEK_S)) == {}
    age(Path(local.root.path()), 2)
    found = find_garbage(local.root, WEEK_S)
    assert places(found) == {"pairs/aa": "temporaries", ".": "temporaries"}
    with exclusive(local.lock("pairs", "aa")):
        assert places(find_garbage(local.root, WEEK_S)) == {".": "temporaries"}
    delete(local.root, found)
    assert {path.name for path in Path(local.root.path()).rglob("*.tmp")} == {".mine.tmp"}


def test_scratch_folders_of_dead_processes_go(local: Ledger, temporary_folder: Path) -> None:
    for name, days in (("ldm-old", 9000), ("ldm-new", 0), ("other-old", 9000)):
        (temporary_folder / name).mkdir()
        (temporary_folder / name / "file").write_bytes(b"data")
        age(temporary_folder / name, days)
    found = find_garbage(local.root, WEEK_S)
    assert places(found) == {str(temporary_folder / "ldm-old"): "scratch"}
    delete(local.root, found)
    assert sorted(path.name for path in temporary_folder.iterdir()) == ["ldm-new", "other-old"]


def test_a_cache_of_shards_goes_when_nobody_uses_it(
    local: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    cache = NodeCache(Storage("memory://cache"))
    folder = cache_folder()
    assert places(find_garbage(local.root, WEEK_S)) == {}
    # As a process that is killed leaves it: what it held is free, and its files are there.
    (folder / f"{'0' * 64}.file").write_bytes(b"shard")
    cache._user.close()
    found = find_garbage(local.root, WEEK_S)
    assert places(found) == {str(folder): "scratch"}
    delete(local.root, found)
    assert not folder.exists()


def test_uploads_that_were_never_completed_go_after_a_day(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make_root(f"s3://{BUCKET}/uploads")
    finished(ledger, "pairs", "aa")
    for key in ("uploads/pairs/aa/000009.tar", "uploads2/pairs/aa/000009.tar"):
        upload = s3.client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        s3.client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=bytes(70))
    # moto says of every upload that it began in 2010.
    with monkeypatch.context() as patch:
        patch.setattr(garbage, "DAY_S", 100 * 365 * DAY_S)
        assert places(find_garbage(ledger.root, WEEK_S)) == {}
    found = find_garbage(ledger.root, WEEK_S)
    assert [(each.place, each.bytes) for each in found.garbage if each.kind == "upload"] == [
        ("pairs/aa/000009.tar", 70)
    ]
    delete(ledger.root, found)
    assert s3.uploads("uploads") == ["uploads2/pairs/aa/000009.tar"]


def test_locks_that_guard_nothing_go_and_those_of_unfinished_work_stay(local: Ledger) -> None:
    finished(local, "pairs", "aa")
    begun(local, "latents", "bb")
    a_run(local, begins=("latents", "bb"))
    for stage, key in (("pairs", "aa"), ("latents", "bb"), ("export", "gone")):
        with exclusive(local.lock(stage, key)):
            pass
    delete(local.root, find_garbage(local.root, WEEK_S))
    names = (local.root / LOCKS).names()
    assert [name for name in names if not name.startswith("run-")] == ["latents-bb"]
    assert len(names) == 2


def test_what_another_process_holds_stays(ledger: Ledger, holder: Callable[[Storage], subprocess.Popen[str]]) -> None:
    superseded(ledger, "pairs", "aa")
    begun(ledger, "pairs", "bb")
    found = find_garbage(ledger.root, 0.0)
    held = [holder(ledger.lock("pairs", key)) for key in ("aa", "bb")]
    before = objects(ledger.root)
    left = {each.place: each.why for each in delete(ledger.root, found)}
    assert left.keys() == {"pairs/aa", "pairs/bb"}
    assert f"is in use by pid {held[0].pid}" in left["pairs/aa"]
    assert f"is in use by pid {held[1].pid}" in left["pairs/bb"]
    assert objects(ledger.root) == before
    found = find_garbage(ledger.root, 0.0)
    assert "pairs/bb" not in places(found)
    assert f"pid {held[1].pid}" in reasons(found)["pairs/bb"]


def test_two_at_once_delete_everything_once(ledger: Ledger) -> None:
    for number in range(4):
        superseded(ledger, "pairs", f"aa{number}")
        begun(ledger, "latents", f"bb{number}")
    finished(ledger, "pairs", "cc")
    program = (
        "import sys; from pipelines.store.storage import Storage;"
        "from pipelines.inspection.garbage import delete, find_garbage;"
        "root = Storage(sys.argv[1]); delete(root, find_garbage(root, 0.0))"
    )
    command = [sys.executable, "-c", program, ledger.root.url]
    processes = [subprocess.Popen(command, env=dict(os.environ)) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert not places(find_garbage(ledger.root, 0.0))
    assert {each.place for each in read_catalogue(ledger.root).artifacts if each.condition != "deleted"} == {"pairs/cc"}


def test_a_removal_that_was_killed_is_gone_on_with(ledger: Ledger) -> None:
    old = superseded(ledger, "pairs", "aa")
    old.storage.remove("manifest.json")
    found = find_garbage(ledger.root, WEEK_S)
    assert places(found) == {"pairs/aa": "superseded"}
    delete(ledger.root, found)
    assert list(old.storage.files_below()) == [SUPERSEDED]


def test_a_run_to_forget_must_be_there_and_have_ended(local: Ledger) -> None:
    with pytest.raises(MisuseError, match=r"no run nobody under .*: `ldm ls .*` names them"):
        find_garbage(local.root, WEEK_S, ["nobody"])
    with (
        begin(local.root, "small", "", "digest") as run,
        pytest.raises(UserError, match=f"run {run.id} under .* is at work"),
    ):
        find_garbage(local.root, WEEK_S, [run.id])


def test_nothing_is_removed_while_it_is_unknown_what_runs_refer_to(local: Ledger) -> None:
    superseded(local, "pairs", "aa")
    run = a_run(local)
    (local.root / RUNS / run).write_json("run.json", {"name": "small"})
    with pytest.raises(UserError, match=rf"{run}/run.json is not the state of a run"):
        find_garbage(local.root, WEEK_S)


def test_many_objects_go_with_few_requests(use_s3: Callable[[str], None]) -> None:
    with fast_s3() as server:
        use_s3(server.url)
        ledger = make_root(f"s3://{BUCKET}/root")
        begun(ledger, "pairs", "aa")
        server.add_objects((f"root/pairs/aa/{number:06d}.tar", 10) for number in range(5000))
        found = find_garbage(ledger.root, WEEK_S)
        server.take_figures()
        delete(ledger.root, found)
        assert server.take_figures().count < 100
        assert objects(ledger.root) == {"ledger.json"}
