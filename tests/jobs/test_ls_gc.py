"""`ldm ls` and `ldm gc` as people and scripts meet them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from pipelines.store.lock import exclusive
from pipelines.store.storage import Storage
from tests.jobs.conftest import Ldm
from tests.pipelines.inspection.rooted import a_run, begun, finished, make_root, superseded


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for temporary files that no other process writes to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_ls_shows_runs_and_artifacts(ldm: Ldm) -> None:
    ledger = make_root("root")
    pairs = finished(ledger, "pairs", "aa")
    begun(ledger, "latents", "bb")
    run = a_run(ledger, pairs, begins=("latents", "bb"))
    with exclusive(ledger.lock("latents", "bb")):
        code, out, _ = ldm("ls", "root", "--json")
        assert code == 0
        shown = " ".join(ldm("ls", "root")[1].split())
    found = json.loads(out.splitlines()[-1])
    assert [(each["id"], each["state"], each["name"]) for each in found["runs"]] == [(run, "failed", "small")]
    assert [(each["stage"], each["key"], each["state"], each["rows"]) for each in found["artifacts"]] == [
        ("pairs", "aa", "finished", 20),
        ("latents", "bb", "being made", None),
    ]
    assert found["artifacts"][0]["used_by"] == [f"run {run}"]
    assert found["artifacts"][1]["holder"]["alive"] is True
    for text in (f"{run} small failed", "pairs, latents …", "pairs aa finished 20 200 B", "being made by pid"):
        assert text in shown


def test_gc_shows_what_would_go_and_deletes_it_with_yes(ldm: Ldm) -> None:
    ledger = make_root("root")
    old = superseded(ledger, "pairs", "aa")
    kept = superseded(ledger, "pairs", "bb")
    run = a_run(ledger, kept)
    code, out, _ = ldm("gc", "root")
    assert code == 0
    assert "200 B in all: the same with --yes deletes it" in out
    assert f"--forget {run}" in " ".join(out.split())
    assert old.storage.exists("manifest.json")
    code, out, _ = ldm("gc", "root", "--yes", "--json")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert [each["place"] for each in found["garbage"] if each["kind"] != "lock"] == ["pairs/aa"]
    assert [each["place"] for each in found["kept"]] == ["pairs/bb"]
    assert (found["deleted"], found["bytes"], found["left"]) == (True, 200, [])
    assert not old.storage.exists("manifest.json")
    assert kept.storage.exists("manifest.json")
    assert ldm("gc", "root", "--yes", "--forget", run)[0] == 0
    assert ldm("gc", "root")[1].splitlines() == [f"nothing to delete under {Storage('root').url}"]
    assert ldm("ls", "root")[1].splitlines() == [f"no runs and no artifacts under {Storage('root').url}"]


def test_mistakes_are_said_on_one_line(ldm: Ldm) -> None:
    Path("empty").mkdir()
    for command in ("ls", "gc"):
        code, _, error = ldm(command, "empty")
        assert (code, error.count("\n")) == (1, 1)
        assert "is not the root of a run (ledger.json is missing)" in error
    make_root("root")
    code, _, error = ldm("gc", "root", "--forget", "nobody")
    assert (code, error.count("\n")) == (2, 1)
    old = Path("old") / "pairs" / ("a" * 16)
    old.mkdir(parents=True)
    (old / "manifest.json").write_text('{"stage": "pairs", "files": []}')
    code, _, error = ldm("ls", "old")
    assert (code, error.count("\n")) == (1, 1)
    assert "was made by ldm 0.1" in error
