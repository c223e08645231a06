"""The training loop in this process, without Ray: what a gradient that is not finite does."""

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
    with pytest.raises(UserError, match="the loss is not finite at step 2 for samples key-21: look at"):
        loop.run(NoCheckpoints())  # type: ignore[arg-type]
    state = torch.load(tmp_path / "artifact/debug/step_00000002.pt", weights_only=True)
    assert state["bad_keys"] == ["key-21"]
    assert state["keys"] == [f"key-{position}" for position in range(16, 24)]
    assert len(weights) == 3, "no further step"
    for name, tensor in state["network"].items():
        assert torch.equal(tensor, weights[1][name]), "as the step before left them"
