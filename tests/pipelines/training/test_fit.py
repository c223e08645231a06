"""Training with a real Ray and two workers, through the death of one; that of all is in tests/faults."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
import torch

from pipelines.errors import UserError
from pipelines.notices import told_to
from pipelines.training import fit
from pipelines.training.fit import finished
from tests.pipelines.store.held_root import TAKEN_OVER, held_root
from tests.pipelines.training import toy

ray.cloudpickle.register_pickle_by_value(toy)


@pytest.fixture(scope="module")
def uninterrupted(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> toy.Run:
    run = toy.Run(tmp_path_factory.mktemp("uninterrupted"))
    run.fit()
    return run


def assert_same_training(run: toy.Run, reference: toy.Run) -> None:
    for name, weight in reference.weights().items():
        assert torch.equal(run.weights()[name], weight), name
    assert run.history() == reference.history()
    assert run.seen() == reference.seen()


def test_the_loss_falls_and_everything_is_reported(uninterrupted: toy.Run) -> None:
    losses = [entry["loss"] for entry in uninterrupted.history()]
    assert [entry["step"] for entry in uninterrupted.history()] == list(range(4, 49, 4))
    assert losses[-1] < 0.3 * losses[0]
    held_out = [entry["held_out"] for entry in uninterrupted.history() if "held_out" in entry]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]
    assert uninterrupted.progress[0] == (0, 48)
    assert uninterrupted.progress[-1] == (48, 48)
    assert uninterrupted.writer.committed().names == [
        "history.json",
        "previews/step_00000016.png",
        "previews/step_00000032.png",
        "previews/step_00000048.png",
        "weights.pt",
    ]
    assert not (uninterrupted.folder / "artifact/train").exists()
    assert uninterrupted.workers_closed() == 2


def test_every_step_sees_its_own_samples_once(uninterrupted: toy.Run) -> None:
    seen = uninterrupted.seen()
    assert sorted(seen) == list(range(48))
    for step, samples in seen.items():
        assert sorted(position for position, _, _ in samples) == list(range(8 * step, 8 * step + 8))
    first_epoch = [(shard, row) for step in seen for position, shard, row in seen[step] if position < sum(toy.ROWS)]
    assert sorted(first_epoch) == [(shard, row) for shard, rows in enumerate(toy.ROWS) for row in range(rows)]


@pytest.mark.timeout(900)
def test_whatever_dies_and_however_often_training_goes_on_and_the_weights_come_out_the_same(
    uninterrupted: toy.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "RESTART_PAUSE_S", 0.1)
    run, lines = toy.Run(tmp_path), list[str]()
    free = ray.available_resources().get("CPU", 0)
    with told_to(lines.append):
        # Workers die more often than failures are allowed, but not without a new checkpoint in between; a store that
        # fails for longer than the patience with it, without a new checkpoint since, is no failure.
        details = run.fit(die_at=(10, 19), outages=1, controller_dies_at=27, max_failures=1)
    assert lines == [
        f"training stopped ({reason}): it goes on from the newest checkpoint"
        for reason in (
            "its workers failed too often",
            "s3://bucket/a cannot be reached (SlowDown 503)",
            "Ray Train's controller died",
        )
    ]
    assert run.workers_started() == 2 * 5
    assert details["steps"] == 48
    assert_same_training(run, uninterrupted)
    wait_until(lambda: ray.available_resources().get("CPU", 0) >= free)


def test_a_worker_that_dies_without_getting_anywhere_ends_the_run(ray_cluster: None, tmp_path: Path) -> None:
    run = toy.Run(tmp_path)
    with pytest.raises(UserError, match=r"^training workers died more often than training.max_failures allows .*run "):
        run.fit(workers=1, die_at=(3, 3), max_failures=1)
    assert run.workers_started() == 2


def test_one_worker_does_the_same_as_two_and_what_it_tells_reaches_the_driver(
    uninterrupted: toy.Run, tmp_path: Path
) -> None:
    run, lines = toy.Run(tmp_path), list[str]()
    with told_to(lines.append):
        run.fit(workers=1, steps=16, says="the cache is too small")
    assert lines == ["the cache is too small"]
    assert run.seen() == {step: samples for step, samples in uninterrupted.seen().items() if step < 16}


def test_a_loss_that_is_not_a_number_stops_at_once_and_names_the_sample(ray_cluster: None, tmp_path: Path) -> None:
    run = toy.Run(tmp_path)
    order = toy.ToyBatches(toy.ToyTask(tmp_path)).order
    keys = ["key-{}-{}".format(*order.sample(position).place) for position in range(96, 104)]
    with pytest.raises(UserError, match=rf"^the loss is not finite at step 12 for samples {keys[5]}: look at .*debug"):
        run.fit(bad_at=101)
    assert run.workers_started() == 2, "a mistake in the data must not be tried again"
    state = torch.load(tmp_path / "artifact/debug/step_00000012.pt", weights_only=True)
    assert state["bad_keys"] == [keys[5]]
    assert state["keys"] == keys


def wait_until(holds: Callable[[], bool]) -> None:
    """Return when a condition holds; the test's own time limit ends it otherwise."""
    while not holds():
        time.sleep(0.1)


def test_the_workers_are_gone_when_another_driver_has_taken_the_root_over(ray_cluster: None, tmp_path: Path) -> None:
    free = ray.available_resources().get("CPU", 0)
    with held_root() as root:

        def lose_root(done: int, total: int) -> None:
            if done and not root.lost:
                root.lose()

        run = toy.Run(tmp_path, watch=lose_root, check=root.check)
        with pytest.raises(UserError, match=TAKEN_OVER):
            run.fit(steps=4000)
    assert run.progress[-1][0] < 4000
    assert finished(run.writer) is None
    pids = [int(file.suffix[1:]) for file in (tmp_path / "log").glob("started.*")]
    assert len(pids) == 2, "a driver without a root must not start its workers again"
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))
    wait_until(lambda: ray.available_resources().get("CPU", 0) >= free)
