"""What lies under a root, and how few requests it takes to say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.inspection.catalogue import ArtifactFacts, open_root, read_catalogue
from pipelines.run.runs import begin, lock_of
from pipelines.store.ledger import Ledger
from pipelines.store.lock import LEASE, exclusive
from pipelines.store.storage import Storage
from tests.pipelines.inspection.rooted import a_run, begun, finished, make_root, superseded
from tests.pipelines.store.s3 import BUCKET, S3
from tests.s3 import fast_s3


@pytest.fixture(params=["local", "s3"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    if request.param == "local":
        return make_root(str(tmp_path / "root"))
    request.getfixturevalue("s3")
    return make_root(f"s3://{BUCKET}/{request.node.name.replace('[', '-').rstrip(']')}")


def conditions(root: Storage) -> dict[str, str]:
    return {each.place: each.condition for each in read_catalogue(root).artifacts}


def test_artifacts_have_a_condition_sizes_and_users(ledger: Ledger) -> None:
    pairs = finished(ledger, "pairs", "aa")
    superseded(ledger, "latents", "bb", {"pairs": "aa+2"})
    begun(ledger, "diffusion", "cc")
    run = a_run(ledger, pairs, begins=("diffusion", "cc"))
    found = {each.place: each for each in read_catalogue(ledger.root).artifacts}
    assert {place: each.condition for place, each in found.items()} == {
        "pairs/aa": "finished",
        "latents/bb": "superseded",
        "diffusion/cc": "unfinished",
    }
    manifest = found["pairs/aa"].manifest
    assert manifest is not None
    assert (manifest.rows, manifest.bytes, manifest.files) == (20, 200, 2)
    assert found["pairs/aa"].used_by == (f"run {run}", "latents bb")
    assert found["diffusion/cc"].used_by == (f"run {run}",)
    assert all(each.since for each in found.values())


def test_who_makes_an_artifact_is_told_and_how_far_it_is(ledger: Ledger) -> None:
    begun(ledger, "pairs", "aa")
    # Whole seconds, of which a store tells the time, and a machine that stops for some make a lease of shorter
    # heartbeats look out of date.
    with exclusive(ledger.lock("pairs", "aa"), 3.0) as hold:
        hold.tell(done=3, total=7)

        def told() -> ArtifactFacts | None:
            (artifact,) = read_catalogue(ledger.root).artifacts
            return artifact if artifact.holder and artifact.holder.progress else None

        while (artifact := told()) is None:
            hold.tell(done=3, total=7)
        assert artifact.condition == "being made"
        assert artifact.holder is not None
        assert artifact.holder.progress == {"done": 3, "total": 7}
        assert artifact.holder.name.startswith("pid ")
    assert conditions(ledger.root) == {"pairs/aa": "unfinished"}


def test_a_run_without_a_living_driver_was_killed(ledger: Ledger) -> None:
    def condition() -> str:
        (run,) = read_catalogue(ledger.root).runs
        return run.condition

    with begin(ledger.root, "small", "name: small\n", "digest") as run:
        assert condition() == "running"
    assert condition() == "finished"
    run.end("running")
    assert condition() == "killed"


def test_the_lease_of_a_dead_driver_does_not_pass_for_a_living_one(s3: S3) -> None:
    ledger = make_root(f"s3://{BUCKET}/dead-lease")
    begun(ledger, "pairs", "aa")
    with begin(ledger.root, "small", "name: small\n", "digest") as run:
        pass
    run.end("running")
    # By the clock of the store, a lease of beats of no length is out of date once that has ticked.
    for place, beat_s in ((ledger.lock("pairs", "aa"), 0.0), (lock_of(ledger.root, run.id), 1e6)):
        place.write_json(LEASE, {"holder": "pid 1 on dead", "token": "dead", "beat": 7, "beat_s": beat_s})
    while (place := ledger.lock("pairs", "aa")).seconds_since_written(LEASE) == 0:
        pass
    assert conditions(ledger.root) == {"pairs/aa": "unfinished"}
    assert [run.condition for run in read_catalogue(ledger.root).runs] == ["running"]
    assert place.exists(LEASE)


def test_a_store_that_does_not_tell_the_time_leaves_the_question_open(use_s3: Callable[[str], None]) -> None:
    with fast_s3() as server:
        use_s3(server.url)
        ledger = make_root(f"s3://{BUCKET}/root")
        begun(ledger, "pairs", "aa")
        with exclusive(ledger.lock("pairs", "aa")), begin(ledger.root, "small", "name: small\n", "digest"):
            assert conditions(ledger.root) == {"pairs/aa": "being made?"}
            assert [run.condition for run in read_catalogue(ledger.root).runs] == ["running?"]


def test_requests_do_not_depend_on_the_number_of_shards(use_s3: Callable[[str], None]) -> None:
    with fast_s3() as server:
        use_s3(server.url)
        ledger = make_root(f"s3://{BUCKET}/root")
        finished(ledger, "pairs", "aa")
        before = read_catalogue(ledger.root)
        server.take_figures()
        assert read_catalogue(ledger.root) == before
        few = server.take_figures().count
        server.add_objects((f"root/pairs/aa/{number:06d}.tar", 10) for number in range(20_000))
        assert read_catalogue(ledger.root) == before
        assert server.take_figures().count == few < 20


def test_what_is_no_root_or_one_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not the root of a run \(ledger.json is missing\)"):
        open_root(str(tmp_path))
    Storage(str(tmp_path)).write_json("ledger.json", {"version": 9})
    with pytest.raises(UserError, match="is of ledger version 9"):
        open_root(str(tmp_path))
