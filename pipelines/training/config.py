"""What a recipe says about optimisation; shared by the first stage and the diffusion model."""

from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Config, runtime


class TrainingConfig(Config):
    """Optimisation of one network over global batches.

    Args:
        steps: optimiser steps.
        batch_size: global batch (samples per step over all workers); must be divisible by `workers`.
        learning_rate: peak of AdamW's rate, reached after `warmup_steps`, then `constant` or `cosine` down to a tenth.
        gradient_clip: maximum global norm of the gradient; None for no clipping.
        ema_decay: of the exponential moving average of the weights.
        precision: autocast dtype of forward and backward.
        compile: with `torch.compile`; needs a C++ compiler, pays on GPUs.
        activation_checkpointing: recompute blocks in the backward pass; saves memory, costs time.
        workers: Ray Train workers, one a GPU (or a CPU core).
        use_gpu: None uses GPUs where the cluster has one for each worker.
        checkpoint_every_steps, keep_checkpoints: what a restart can lose, and what it costs.
        max_failures: restarts of the worker group before the run gives up.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clip: float | None = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = runtime(False)
    activation_checkpointing: bool = runtime(False)
    workers: int = runtime(1, ge=1)
    use_gpu: bool | None = runtime(None)
    checkpoint_every_steps: int = runtime(1000, ge=1)
    keep_checkpoints: int = runtime(2, ge=1)
    log_every_steps: int = runtime(10, ge=1)
    sample_every_steps: int = runtime(1000, ge=1)
    max_failures: int = runtime(3, ge=0)

    @model_validator(mode="after")
    def _equal_shares(self) -> "TrainingConfig":
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size must be divisible by workers, got {self.batch_size} for {self.workers} workers"
            )
        return self
