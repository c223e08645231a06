"""The training loop in this process, without Ray: what a gradient that is not finite does."""

import copy
from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from pipelines.training.config import TrainingConfig
from pipelines.training.loop import Rank, TrainingLoop
from tests.golden.test_golden_losses import NoCheckpoints, NoDriver
from tests.pipelines.training import toy


@pytest.mark.parametrize("log_every_steps", [1, 100])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named_though_it_is_looked_at_later(
    log_every_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_threads: None
) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    config = TrainingConfig(
        steps=9, batch_size=toy.BATCH_SIZE, learning_rate=0.02, warmup_steps=0, log_every_steps=log_every_steps
    )
    run, weights = toy.Run(tmp_path), list[dict[str, torch.Tensor]]()
    loop = TrainingLoop(
        toy.ToyTask(log=tmp_path, bad_at=2 * toy.BATCH_SIZE + 5),
        config,
        toy.SEED,
        run.writer,
        NoDriver(),  # type: ignore[arg-type]
        Rank(0, 1, torch.device("cpu")),
    )
    update = loop.ema.update if loop.ema else None
    assert update is not None

    def watched() -> None:
        weights.append({name: tensor.clone() for name, tensor in loop.network.state_dict().items()})
        update()

    monkeypatch.setattr(loop.ema, "update", watched)
    keys = [loop.learner.batches.reader.key(*sample.place) for sample in loop.learner.batches.order.slice(2, 0, 1)]
    with pytest.raises(UserError, match=f"the loss is not finite at step 2 for samples {keys[5]}: look at"):
        loop.run(NoCheckpoints())  # type: ignore[arg-type]
    state = torch.load(tmp_path / "artifact/debug/step_00000002.pt", weights_only=True)
    assert state["bad_keys"] == [keys[5]]
    assert state["keys"] == keys
    assert len(weights) == 3, "no further step"
    for name, tensor in state["network"].items():
        assert torch.equal(tensor, weights[1][name]), "as the step before left them"


def test_moments_of_a_checkpoint_lie_in_memory_as_the_weights_do(tmp_path: Path, own_threads: None) -> None:
    run = toy.Run(tmp_path)
    config = TrainingConfig(steps=9, batch_size=toy.BATCH_SIZE, learning_rate=0.02)
    task, rank = toy.ToyTask(log=tmp_path), Rank(0, 1, torch.device("cpu"))
    loop = TrainingLoop(task, config, toy.SEED, run.writer, NoDriver(), rank)  # type: ignore[arg-type]
    weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    loop.optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.randn_like(weight)
    loop.optimizer.step()
    state = loop._state(loop.ema)  # type: ignore[arg-type]
    state["optimizer"] = copy.deepcopy(state["optimizer"])
    expected = loop.optimizer.state[weight]["exp_avg"].clone()
    # As a GPU trains, and so saves, it.
    for name in ("exp_avg", "exp_avg_sq"):
        moments = state["optimizer"]["state"][0]
        moments[name] = moments[name].contiguous(memory_format=torch.channels_last)
    loop._restore(state)
    restored = loop.optimizer.state[weight]["exp_avg"]
    assert restored.stride() == weight.stride(), "the fused step goes through memory alone"
    assert torch.equal(restored, expected)
