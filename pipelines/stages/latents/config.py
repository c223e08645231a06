"""The `latents` section of a recipe."""

from typing import Any, Literal

from pydantic import Field

from pipelines.conditions.config import Condition
from pipelines.config import Config, runtime


class LatentsSettings(Config):
    """The `latents` stage: every pair through the frozen encoders, once.

    Args:
        batch_size: pictures per forward pass. Part of the key: kernels, and so the last bit, may depend on it.
        precision: precision of the encoder's forward pass; the cache is always fp16.
        workers: number of Ray actors, each with one encoder on one GPU or CPU core; None takes all of them.
        use_gpu: whether actors run on GPUs; None takes them if the cluster has any.
        decode_threads: threads per actor that decode pictures while the encoder runs.
        max_poisoned_share: share of the shards that may be left out because encoding them kills the worker each time;
            more of them fail the stage. No part of the key: which shards these are is the fault of the machines.
        max_unencodable_share: share of the pictures that may be left out because the first stage encodes them to
            values that are not finite in fp16; more of them fail the stage.
    """

    batch_size: int = Field(16, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int | None = runtime(None, ge=1)
    use_gpu: bool | None = runtime(None)
    decode_threads: int = runtime(2, ge=1)
    max_poisoned_share: float = runtime(0.01, ge=0, le=1)
    max_unencodable_share: float = runtime(0.01, ge=0, le=1)


class LatentsConfig(LatentsSettings):
    """All that the stage goes by: its section of a recipe, and the recipe's condition."""

    condition: Condition

    def identity(self) -> dict[str, Any]:
        # What is cached does not depend on the size of a network that is trained later.
        return {**super().identity(), "condition": self.condition.cached_identity()}
