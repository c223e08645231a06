"""The `evaluate` section of a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Config, runtime
from pipelines.stages.diffusion.config import SamplingConfig


class EvaluateConfig(Config):
    """The `evaluate` stage: sample fixed prompts with fixed seeds from the final EMA weights.

    Args:
        prompts: what to sample: captions, or names of classes; of an unconditional model empty ones, one a picture.
        prompts_file: a file of more prompts, .txt (one per line) or .jsonl (`prompt`, and what a detector should
            see). Its sha256 is part of the key, its path is not.
        training_captions: how many captions (or classes) of the training set to sample too, shown with the pictures
            they belong to.
        held_out_captions: how many of held-out pairs to sample and show likewise; no more than are held out.
        sampling: sampler, steps and guidance.
        precision: of the network. `auto` is bf16 on GPUs and on CPUs with instructions for it, else fp32: pictures then
            depend on the machine, which they do not unless a recipe says so.
        detector: `shapes` reads colour and shape back from the pixels and reports `alignment_accuracy`; None scores
            nothing.
        workers: number of Ray actors, each with one model on one GPU or CPU core; None takes all of them.
        use_gpu: whether actors run on GPUs; None takes them if the cluster has any.
    """

    prompts: tuple[str, ...] = ()
    prompts_file: str | None = runtime(None)
    training_captions: int = Field(8, ge=0)
    held_out_captions: int = Field(8, ge=0)
    sampling: SamplingConfig = SamplingConfig()
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    detector: Literal["shapes"] | None = None
    workers: int | None = runtime(None, ge=1)
    use_gpu: bool | None = runtime(None)

    @model_validator(mode="after")
    def _something_to_sample(self) -> "EvaluateConfig":
        # Not by the held-out captions: a small set has none.
        if not self.prompts and self.prompts_file is None and self.training_captions == 0:
            raise ValueError("nothing to sample: give `prompts`, `prompts_file` or `training_captions`")
        return self
