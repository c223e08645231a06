"""The folders of runs: one each, continued by the next run of the same recipe if its driver was killed or failed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.run import runs
from pipelines.run.results import StageRow
from pipelines.run.runs import all_runs, begin
from pipelines.store.lock import LEASE, exclusive
from pipelines.store.storage import Storage

BEAT_S = 0.05
DRIVER = """
import sys, time
from pipelines.run.runs import begin
from pipelines.store.storage import Storage
with begin(Storage(sys.argv[1]), "tiny", "name: tiny", sys.argv[2]) as run:
    print(run.id, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


@pytest.fixture
def root_of_leases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setattr(runs, "exclusive", partial(exclusive, beat_s=BEAT_S))
    storage = Storage("memory://runs")
    yield storage
    storage.remove()


def begin_and_die(root: Storage, digest: str) -> str:
    """Begin a run in a process that is killed; return the run's id."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER, root.url, digest], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    process.kill()
    process.communicate()
    assert run_id
    return run_id


def written(root: Storage, run_id: str) -> dict[str, object]:
    state: dict[str, object] = (root / "runs" / run_id).read_json("run.json")
    return state


def states(root: Storage) -> dict[str, str]:
    return {run.id: run.state.state for run in all_runs(root)}


def test_a_run_leaves_its_recipe_and_what_became_of_its_stages(root: Storage) -> None:
    with begin(root, "My recipe: 256 px", "name: tiny", "digest") as run:
        assert "-My-recipe-256-px-" in run.id
        assert run.folder.read_bytes("recipe.yaml") == b"name: tiny"
        assert written(root, run.id)["state"] == "running"
        for state in ("run", "cached"):
            run.record(StageRow("pairs", state, "0" * 16, rows=3), None)
        run.track("mlflow-run")
    found = written(root, run.id)
    assert (found["state"], found["recipe_digest"], found["tracking_run"]) == ("finished", "digest", "mlflow-run")
    assert found["ended_at"]
    assert [(stage["name"], stage["state"], stage["rows"]) for stage in found["stages"]] == [("pairs", "cached", 3)]


def test_a_killed_run_is_continued_by_the_next_one_of_its_recipe_and_by_no_other(root: Storage) -> None:
    killed = begin_and_die(root, "ours")
    with begin(root, "tiny", "name: tiny", "theirs") as other:
        assert other.id != killed
    with begin(root, "tiny", "name: tiny", "ours") as run:
        assert run.id == killed
    assert states(root) == {killed: "finished", other.id: "finished"}


def test_a_failed_run_is_continued_with_all_it_knew_and_a_finished_one_is_not(root: Storage) -> None:
    with contextlib.suppress(UserError), begin(root, "tiny", "name: tiny", "digest") as failed:
        failed.track("mlflow-run")
        raise UserError("disk full")
    assert states(root) == {failed.id: "failed"}
    with begin(root, "tiny", "name: tiny", "digest") as run:
        assert run.id == failed.id
        assert run.state.tracking_run == "mlflow-run"
        assert written(root, run.id)["state"] == "running"
        assert written(root, run.id)["ended_at"] is None
    with begin(root, "tiny", "name: tiny", "digest") as another:
        assert another.id != run.id


def test_two_runs_of_one_recipe_at_once_have_a_folder_each(root: Storage) -> None:
    with begin(root, "tiny", "name: tiny", "digest") as first, begin(root, "tiny", "name: tiny", "digest") as second:
        assert first.id != second.id
    assert states(root) == {first.id: "finished", second.id: "finished"}


def test_folders_without_a_readable_state_are_passed_over(root: Storage) -> None:
    (root / "runs" / "20260101-000000-torn-0000").write_bytes("run.json", b'{"state": "runn')
    (root / "runs" / "20260101-000001-other-0000").write_json("run.json", {"state": "dreaming"})
    (root / "runs" / "20260101-000002-empty-0000").write_bytes("recipe.yaml", b"name: tiny")
    with begin(root, "tiny", "name: tiny", "digest") as run:
        assert states(root) == {run.id: "running"}


def test_runs_are_listed_newest_first(root: Storage) -> None:
    for name in ("20260102-000000-b-0000", "20260101-000000-a-0000", "20260103-000000-c-0000"):
        state = {"name": "tiny", "recipe_digest": "digest", "state": "finished", "started_at": "2026-01-01T00:00:00Z"}
        (root / "runs" / name).write_json("run.json", state)
    assert [run.id[16] for run in all_runs(root)] == ["c", "b", "a"]
    assert [run.id[16] for run in all_runs(root, newest=1)] == ["c"]


def test_a_run_that_another_driver_continues_is_written_by_that_one_alone(root_of_leases: Storage) -> None:
    root = root_of_leases
    context = begin(root, "tiny", "name: tiny", "digest")
    run = context.__enter__()
    renewal = next(each for each in threading.enumerate() if each.name == "ldm-lease")
    # While it was suspended, say.
    lease = {"holder": "pid 2 on other", "token": "other", "beat": 0, "beat_s": BEAT_S}
    theirs = json.dumps({**run.state.model_dump(mode="json"), "tracking_run": "theirs"}).encode()
    run.folder.write_bytes("run.json", theirs)
    # It ends once it knows. Until then a renewal that is under way may write over their lease.
    while renewal.is_alive():
        (root / ".locks" / f"run-{run.id}").write_json(LEASE, lease)
        renewal.join(timeout=BEAT_S)
    with pytest.raises(UserError, match="was taken over by pid 2 on other"):
        context.__exit__(None, None, None)
    assert run.folder.read_bytes("run.json") == theirs
