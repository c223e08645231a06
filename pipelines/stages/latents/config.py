"""The `latents` section of a recipe."""

from typing import Literal

from pydantic import Field

from pipelines.config import Config, runtime


class TokenizerConfig(Config):
    """The tokenizer of the jointly trained text transformer.

    Args:
        vocabulary: a WordPiece `vocab.txt` (bert-base-uncased's, for the paper's models); None builds one from the
            captions. The file's sha256 is part of the key, its path is not.
        size: number of entries of a vocabulary built from the captions. Of data sets with up to a million distinct
            words all are counted; with more than twice as many, those that are rare so far are forgotten.
        max_length: tokens per caption, [CLS] and [SEP] included; longer captions are cut, shorter ones padded.
    """

    vocabulary: str | None = runtime(None)
    size: int = Field(4096, ge=64, le=65_536)
    max_length: int = Field(77, ge=3)


class LatentsConfig(Config):
    """The `latents` stage: every pair through the frozen encoders, once.

    Args:
        tokenizer: the tokenizer of the captions.
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

    tokenizer: TokenizerConfig = TokenizerConfig()
    batch_size: int = Field(16, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int | None = runtime(None, ge=1)
    use_gpu: bool | None = runtime(None)
    decode_threads: int = runtime(2, ge=1)
    max_poisoned_share: float = runtime(0.01, ge=0, le=1)
    max_unencodable_share: float = runtime(0.01, ge=0, le=1)
