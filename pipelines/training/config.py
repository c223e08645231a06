"""The `training` section of a recipe; the first stage and the diffusion model each have one."""

from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Config, runtime
from pipelines.errors import MisuseError
from pipelines.shards.partitions import check_workers


class TrainingConfig(Config):
    """Optimisation of one network over global batches.

    Args:
        steps: number of optimiser steps.
        batch_size: global batch size (samples per step over all workers).
        partitions: the most partitions that the samples are cut into, each with its own stream and an equal part of
            every batch. There are as many as the largest divisor of `batch_size` up to it; `workers` must divide that.
        learning_rate: peak learning rate of AdamW.
        warmup_steps: steps of linear warm-up to the peak.
        schedule: after the warm-up, keep the rate `constant` or let it fall by a half `cosine` to a tenth.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's decay rates of the gradient's first and second moment.
        gradient_clip: maximum global norm of the gradient; None does not clip.
        ema_decay: decay of the exponential moving average of the weights.
        precision: autocast dtype of the forward and backward pass. `auto` is bf16 on GPUs and on CPUs with instructions
            for it, else fp32: numbers then depend on the machine, which they do not unless a recipe says so.
        compile: use `torch.compile`; it needs a C++ compiler. None compiles on GPUs, where it pays.
        activation_checkpointing: recompute the blocks of UNet and text transformer in the backward pass, which saves
            memory and costs time.
        workers: number of Ray Train workers, one per GPU or CPU core.
        loader_workers: processes that make the batches of each worker; 0 makes them in a thread of its own process.
            None takes two for a GPU, and the thread where a CPU trains.
        use_gpu: whether workers train on GPUs; None does if the cluster has one for each worker.
        checkpoint_every_steps: steps between checkpoints, the most that a restart can lose.
        keep_checkpoints: how many of the newest checkpoints are kept.
        log_every_steps: steps that a logged loss is the mean of.
        sample_every_steps: steps between previews, and between measurements of the held-out loss.
        held_out_samples: the most held-out samples that this loss is the mean of, a multiple of 4; 0 measures none.
        max_failures: how often the worker group is restarted before the run gives up; failures before the newest
            checkpoint do not count.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    partitions: int = Field(64, ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clip: float | None = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    compile: bool | None = runtime(None)
    activation_checkpointing: bool = runtime(False)
    workers: int = runtime(1, ge=1)
    loader_workers: int | None = runtime(None, ge=0)
    use_gpu: bool | None = runtime(None)
    checkpoint_every_steps: int = runtime(1000, ge=1)
    keep_checkpoints: int = runtime(2, ge=1)
    log_every_steps: int = runtime(10, ge=1)
    sample_every_steps: int = runtime(1000, ge=1)
    held_out_samples: int = runtime(256, ge=0, multiple_of=4)
    max_failures: int = runtime(3, ge=0)

    @model_validator(mode="after")
    def _equal_shares(self) -> "TrainingConfig":
        try:
            check_workers(self.workers, self.batch_size, self.partitions)
        except MisuseError as error:
            raise ValueError(str(error)) from None
        return self
