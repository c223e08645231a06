"""The training loop of each worker: from the newest checkpoint to the last step."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldm_core.ema import EMA
from pipelines.drawing.grids import encode_png
from pipelines.errors import UserError
from pipelines.notices import tell
from pipelines.shards.randomness import Purpose, generator
from pipelines.training.held_out import HeldOutLoss
from pipelines.training.loader.open import Loader, open_loader
from pipelines.training.optimization import build_optimizer, in_parallel, learning_rate, optimize, prepare_network
from pipelines.training.outputs import DETAILS_FILE, HISTORY_FILE
from pipelines.training.relay import Message

if TYPE_CHECKING:
    from pipelines.store.commits import ArtifactWriter
    from pipelines.training.checkpoints import Checkpoints
    from pipelines.training.config import TrainingConfig
    from pipelines.training.relay import Relay
    from pipelines.training.task import Task

SHOWN_KEYS = 8


@dataclass(frozen=True)
class Rank:
    """This worker among the others, as torch.distributed counts them, and the device that it trains on."""

    index: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True on rank 0, which writes all files."""
        return self.index == 0


class TrainingLoop:
    """One worker's part in training a task's network.

    Every worker holds the same weights and the same optimiser state. Rank 0 also holds the moving average of the
    weights and the history, and writes all files.

    Args:
        task: what to train.
        config: the optimisation section of the recipe.
        seed: the recipe's seed.
        writer: the artifact being made.
        relay: where messages to the driver go.
        rank: this worker among the others.
    """

    def __init__(
        self, task: Task, config: TrainingConfig, seed: int, writer: ArtifactWriter, relay: Relay, rank: Rank
    ) -> None:
        self.config, self.seed, self.writer, self.relay, self.rank = config, seed, writer, relay, rank
        # The same initial weights on every worker, whatever their number.
        torch.manual_seed(seed)
        self.learner = task.build(rank.device)
        self.network = self.learner.network.to(rank.device).train()
        self.prepared = prepare_network(self.network, config)
        self.optimizer = build_optimizer(self.network, config)
        self.weights: list[torch.nn.Parameter] = self.optimizer.param_groups[0]["params"]
        self.ema = EMA(self.network, decay=config.ema_decay) if rank.leads else None
        self.step = 0
        self.history: list[dict[str, float]] = []
        # Summed on the device: reading a loss at every step would make a GPU wait for it.
        self.loss_sum = torch.zeros((), device=rank.device)
        self.norm_sum = torch.zeros((), device=rank.device)
        self._last: _Verdict | None = None

    def run(self, checkpoints: Checkpoints) -> None:
        """Train to the last step; on rank 0, then have the task save its files from the averaged weights."""
        try:
            self._train(checkpoints)
        finally:
            self.learner.batches.reader.close()

    def _train(self, checkpoints: Checkpoints) -> None:
        if (state := checkpoints.newest(self.rank.device)) is not None:
            self._restore(state)
        # Else the device would hold it until training ends.
        del state
        wrapped = in_parallel(self.network, self.rank.world_size)
        batches = open_loader(
            self.learner.batches,
            self.rank.index,
            self.rank.world_size,
            self.step,
            self.config.steps,
            processes=self.config.loader_workers,
            device=self.rank.device,
        )
        held_out = self._held_out_loss()
        clock = _Clock(self.step)
        if self.rank.leads:
            self.relay.send(Message(self.step))
        try:
            while self.step < self.config.steps:
                self._obey_stop()
                self._train_step(wrapped, batches.next())
                saves = self._due(self.config.checkpoint_every_steps)
                previews = self._due(self.config.sample_every_steps)
                logs = saves or self._due(self.config.log_every_steps)
                if logs or previews:
                    # Neither a log nor a checkpoint tells of a step that was skipped.
                    self._require_finite()
                # Logged before every checkpoint too: the sums are then empty, and need not be part of it.
                if logs:
                    self._log(clock, batches)
                if previews and self.ema is not None:
                    self._preview(self.ema)
                    if held_out is not None:
                        self._measure(held_out, self.ema)
                if saves and self.step < self.config.steps:
                    checkpoints.save(self.step, self._state(self.ema) if self.ema is not None else None)
        finally:
            batches.close()
            if held_out is not None:
                held_out.close()
        # The last step has no checkpoint: a kill from here on repeats the steps since the one before.
        if self.ema is not None:
            self._finish(self.ema, clock)

    def _obey_stop(self) -> None:
        # One worker is enough: the first UserError to reach the driver ends all of them.
        if self.rank.leads and (reason := self.relay.stop_ordered()) is not None:
            raise UserError(f"training stopped at step {self.step}: {reason}")

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _train_step(self, wrapped: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
        # Dropout, where a network has any, draws from the global generator: after a restart it must draw the same.
        torch.manual_seed(_dropout_seed(self.seed, self.step, self.rank.index))
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, self.step)
        # Freed before the forward pass: they take as much memory as the weights.
        self.optimizer.zero_grad(set_to_none=True)
        with self.prepared.autocast():
            losses = self.learner.losses(wrapped, tensors)
        loss = losses.mean()
        loss.backward()
        self._require_finite()
        norm = optimize(self.optimizer, self.config.gradient_clip)
        self._last = _Verdict(self.step, losses.detach(), norm.isfinite())
        if self.ema is not None:
            self.ema.update()
        self.loss_sum += loss.detach()
        self.norm_sum += norm
        self.step += 1

    def _require_finite(self) -> None:
        """Raise UserError if the last step's gradient was not finite, by which nothing has been changed.

        Looked at while the next step is computed, so that a GPU never waits to be asked. DDP has averaged the gradient:
        it is the same on all workers, and all of them stop here together.
        """
        last, self._last = self._last, None
        if last is not None and not last.finite():
            self._stop(last.step, last.losses)

    def _log(self, clock: _Clock, batches: Loader) -> None:
        elapsed, steps = clock.lap(self.step)
        sums = torch.stack([self.loss_sum, self.norm_sum])
        if self.rank.world_size > 1:
            dist.all_reduce(sums)
        loss, norm = (sums / (steps * self.rank.world_size)).tolist()
        self.loss_sum.zero_()
        self.norm_sum.zero_()
        if not self.rank.leads:
            return
        rate = learning_rate(self.config, self.step - 1)
        self.history.append({"step": self.step, "loss": _short(loss), "grad_norm": _short(norm), "lr": _short(rate)})
        images_per_s = steps * self.config.batch_size / elapsed
        metrics = {
            "loss/train": loss,
            "grad/norm": norm,
            "lr": rate,
            "throughput/images_per_s": images_per_s,
            "time/data_wait_fraction": batches.waited_s / elapsed,
            "memory/peak_gib": _peak_gib(self.rank.device),
        }
        batches.waited_s = 0.0
        facts = {"loss": f"{loss:.4f}", "images_per_s": f"{images_per_s:,.0f}"}
        self.relay.send(Message(self.step, metrics, facts))

    def _preview(self, ema: EMA) -> None:
        name = f"previews/step_{self.step:08d}.png"
        # After a restart, steps are done again whose preview is committed already.
        if self.writer.is_committed(name):
            return
        with self._looked_at(ema):
            picture = self.learner.preview()
        if picture is not None:
            png = encode_png(picture)
            self.writer.commit_once(name, lambda path: path.write_bytes(png))
            self.relay.send(Message(self.step, preview=picture))

    @contextmanager
    def _looked_at(self, ema: EMA) -> Iterator[None]:
        """Let the network be looked at: averaged weights, no dropout, no gradients, and nothing compiled anew."""
        # Other workers wait meanwhile, and blocks compiled for another mode or size would take minutes.
        with ema.swapped(), torch.no_grad(), self.prepared.autocast(), self.prepared.uncompiled():
            self.network.eval()
            try:
                yield
            finally:
                self.network.train()

    def _held_out_loss(self) -> HeldOutLoss | None:
        """Begin to read the held-out samples on rank 0; None if there are none, or their loss is not wanted."""
        if not self.rank.leads or not self.config.held_out_samples:
            return None
        if not self.learner.batches.held_out:
            if self.step == 0:
                tell("no samples are held out, so that no loss/held_out is logged")
            return None
        return HeldOutLoss(self.learner, self.config.held_out_samples, self.config.batch_size // self.rank.world_size)

    def _measure(self, held_out: HeldOutLoss, ema: EMA) -> None:
        with self._looked_at(ema):
            losses = held_out.measure(self.rank.device)
        if not losses:
            return
        if not self.history or self.history[-1]["step"] != self.step:
            self.history.append({"step": self.step})
        self.history[-1] |= {name: _short(loss) for name, loss in losses.items()}
        self.relay.send(Message(self.step, {f"loss/{name}": loss for name, loss in losses.items()}))

    def _stop(self, step: int, losses: Tensor) -> None:
        """Save the state for debugging, then raise UserError with the keys of the samples to blame, of all workers."""
        samples = self.learner.batches.order.slice(step, self.rank.index, self.rank.world_size)
        mine = [self.learner.batches.reader.key(*sample.place) for sample in samples]
        bad = [key for key, fine in zip(mine, losses.isfinite().tolist(), strict=True) if not fine]
        gathered: list[Any] = [(bad, mine)]
        if self.rank.world_size > 1:
            gathered = [None] * self.rank.world_size
            dist.all_gather_object(gathered, (bad, mine))
        bad = [key for part, _ in gathered for key in part]
        keys = [key for _, part in gathered for key in part]
        name = f"debug/step_{step:08d}.pt"
        if self.rank.leads:
            state = {"step": step, "keys": keys, "bad_keys": bad, "network": self.network.state_dict()}
            with self.writer.storage.writer(name) as path:
                torch.save(state, path)
        if self.rank.world_size > 1:
            # The first error to reach the driver ends all workers: none may raise before the state is saved.
            dist.barrier()
        what = "loss" if bad else "gradient"
        named = bad or keys
        shown = ", ".join(named[:SHOWN_KEYS]) + (f" and {len(named) - SHOWN_KEYS} more" if named[SHOWN_KEYS:] else "")
        raise UserError(
            f"the {what} is not finite at step {step} for samples {shown}: look at these samples, or lower the "
            f"learning rate (now {self.config.learning_rate:g}); the state is in {self.writer.storage.url}/{name}"
        )

    def _state(self, ema: EMA) -> dict[str, Any]:
        return {
            "step": self.step,
            "network": self.network.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        # The fused step takes it that moments lie in memory as their weights do, which differs between CPU and GPU.
        for weight, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == weight.shape and moment.stride() != weight.stride():
                    moments[name] = torch.empty_like(weight).copy_(moment)
        self.history = state["history"]
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def _finish(self, ema: EMA, clock: _Clock) -> None:
        history = (json.dumps(self.history, indent=0) + "\n").encode()
        self.writer.commit_once(HISTORY_FILE, lambda path: path.write_bytes(history))
        with ema.swapped(), torch.no_grad():
            self.network.eval()
            facts = self.learner.save(self.writer)
        details = {
            "steps": self.config.steps,
            "final_loss": self.history[-1]["loss"],
            **({"held_out_loss": loss} if (loss := self.history[-1].get("held_out")) is not None else {}),
            "workers": self.rank.world_size,
            "images_per_s": round(clock.steps_per_s(self.step) * self.config.batch_size, 1),
            "trained_parameters": sum(weight.numel() for weight in self.weights),
            **facts,
        }
        self.writer.storage.write_json(DETAILS_FILE, details)


class _Verdict:
    """Whether a step's gradient was finite, on its way from the device.

    Args:
        step: which one.
        losses: (B,) its losses.
        finite: () bool, both on the device.
    """

    def __init__(self, step: int, losses: Tensor, finite: Tensor) -> None:
        self.step, self.losses = step, losses
        # Into pinned memory, beside what is computed next.
        self._finite = finite.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if finite.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def finite(self) -> bool:
        """Wait for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._finite)


class _Clock:
    """Seconds and steps since training began in this process, and since the last lap."""

    def __init__(self, step: int) -> None:
        self._first = self._last = (time.perf_counter(), step)

    def lap(self, step: int) -> tuple[float, int]:
        """Return the seconds and steps since the last lap, and begin a new one."""
        (then, before), self._last = self._last, (time.perf_counter(), step)
        return self._last[0] - then, step - before

    def steps_per_s(self, step: int) -> float:
        return (step - self._first[1]) / max(time.perf_counter() - self._first[0], 1e-9)


def use_cores(workers_here: int) -> None:
    """Share this machine's cores among its workers: each would otherwise start a thread for every core."""
    cores = max(1, len(os.sched_getaffinity(0)) // workers_here)
    torch.set_num_threads(cores)
    # The same for the processes that compile; read when the compiler is imported, at the first pass.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cores))


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(generator(seed, Purpose.DROPOUT, step, rank).integers(2**63))


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
