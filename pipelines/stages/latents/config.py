"""The `latents` section of a recipe."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.conditions.config import Condition
from pipelines.config import Config, runtime

# Equality alone: how much there is of a resource on nodes with certain labels must be countable.
_Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=63)]


class ViewsConfig(Config):
    """Several views of each picture, each with a latent of its own; training picks one each time.

    Captions that say where something is do not fit a mirrored or a cropped picture.

    Args:
        count: views of a picture, itself included.
        mirror: whether every second view is mirrored.
        smallest_crop: sides of the smallest crop, relative to the picture's; crops are drawn between that and 1, and
            resized to the picture's size. 1 is without crops.
    """

    count: int = Field(2, ge=2, le=16)
    mirror: bool = True
    smallest_crop: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _all_differ(self) -> "ViewsConfig":
        if self.smallest_crop == 1 and not (self.mirror and self.count == 2):
            raise ValueError(
                f"views without crops are the picture and its mirror image, got count={self.count} and mirror="
                f"{str(self.mirror).lower()}: set smallest_crop below 1, or leave both as they are by default"
            )
        return self


class LatentsSettings(Config):
    """The `latents` stage: every pair through the frozen encoders, once.

    Shards go through three steps at the same time: tasks on CPUs read and decode one, an actor encodes one, tasks write
    and commit one. Between the steps they lie in Ray's object store, decoded: rows x height x width x 3 bytes, 187 MiB
    for 1,000 pictures of 256 px, times the views. The object stores of all nodes together should hold
    `shards_in_flight` of them for each actor; what is beyond goes to Ray's disk.

    Args:
        batch_size: pictures per forward pass. Part of the key: kernels, and so the last bit, may depend on it.
        precision: precision of the encoder's forward pass; the cache is always fp16.
        compile: compile the first stage where it runs on a GPU. Part of the key, since other kernels give other last
            bits; not the default, since a cache that was begun without it must go on without it.
        views: several views of each picture, mirrored or cropped; None caches pictures as they are alone.
        workers: number of Ray actors, each with one encoder on one GPU or CPU core; None takes all of them.
        use_gpu: whether actors run on GPUs; None takes them if the cluster has any.
        gpus_per_worker: how much of a GPU an actor takes: 0.5 puts two on each.
        decode_threads: threads of a reading task that decode pictures.
        task_cpus: CPUs that a reading or writing task reserves. None is 1 beside encoders on GPUs, and 0 where encoders
            run on CPU cores, which take thousands of times as long: tasks then run beside them.
        task_nodes, encoder_nodes: labels of the nodes (`ray start --labels`) that tasks and actors run on, so that
            pictures are decoded on nodes without a GPU, for example; without any, all nodes.
        shards_in_flight: shards for each actor that may be under way, from being read to being committed. None takes 8
            for a GPU and 3 for a CPU core, or as many as the object stores hold, at least 1.
        max_poisoned_share: share of the shards that may be left out because encoding them kills the worker each time;
            more of them fail the stage. No part of the key: which shards these are is the fault of the machines.
        max_unencodable_share: share of the pictures that may be left out because the first stage encodes them to
            values that are not finite in fp16; more of them fail the stage.
    """

    batch_size: int = Field(16, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    views: ViewsConfig | None = None
    workers: int | None = runtime(None, ge=1)
    use_gpu: bool | None = runtime(None)
    gpus_per_worker: float = runtime(1.0, gt=0, le=1)
    decode_threads: int = runtime(2, ge=1)
    task_cpus: float | None = runtime(None, ge=0)
    task_nodes: dict[str, _Label] = runtime({})
    encoder_nodes: dict[str, _Label] = runtime({})
    shards_in_flight: int | None = runtime(None, ge=1)
    max_poisoned_share: float = runtime(0.01, ge=0, le=1)
    max_unencodable_share: float = runtime(0.01, ge=0, le=1)


class LatentsConfig(LatentsSettings):
    """All that the stage goes by: its section of a recipe, and the recipe's condition."""

    condition: Condition

    def identity(self) -> dict[str, Any]:
        # What is cached does not depend on the size of a network that is trained later.
        return {**super().identity(), "condition": self.condition.cached_identity()}
