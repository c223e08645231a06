"""Configuration of a first stage (paper, Table 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ldm_core.configs.values import check_at_least


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig:
    """Shape of a first stage, in the terms of the paper's Table 8.

    Args:
        regularization: "kl" (Gaussian posterior) or "vq" (codebook absorbed by the decoder).
        in_channels: channels of the images.
        base_channels: channels of the first level, a multiple of `norm_groups`.
        channel_mult: channels of each level, in multiples of `base_channels`; fixes the downsampling factor.
        num_res_blocks: residual blocks per level; the decoder has one more.
        attention_resolutions: sizes in pixels of the feature maps that get attention, for images of
            `trained_at_resolution`.
        mid_attention: whether there is attention between the two middle residual blocks.
        z_channels: channels of the encoder's output (of each moment, for "kl").
        embed_dim: channels of the latent.
        codebook_size: number of codebook entries; required for "vq", None for "kl".
        trained_at_resolution: image height and width that `attention_resolutions` refers to.
        norm_groups: number of groups of every group norm.
        legacy_codebook_loss: for "vq", let beta weigh the codebook term instead of the commitment term, as the
            published models were trained.

    Raises:
        ValueError: a field is out of range or fields contradict each other.
    """

    regularization: Literal["kl", "vq"]
    in_channels: int = 3
    base_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    mid_attention: bool = True
    z_channels: int
    embed_dim: int
    codebook_size: int | None = None
    trained_at_resolution: int = 256
    norm_groups: int = 32
    legacy_codebook_loss: bool = True

    # In a recipe, which pydantic reads, a misspelt setting is an error.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        # JSON has no tuples: a config read back from a checkpoint must equal the one written.
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        if self.regularization not in ("kl", "vq"):
            raise ValueError(f'FirstStageConfig.regularization must be "kl" or "vq", got {self.regularization!r}')
        check_at_least(self, 1, "in_channels", "base_channels", "num_res_blocks", "z_channels", "embed_dim")
        check_at_least(self, 1, "norm_groups")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"FirstStageConfig.channel_mult must list positive factors, got {self.channel_mult}")
        if self.base_channels % self.norm_groups:
            raise ValueError(
                f"FirstStageConfig.base_channels must be a multiple of norm_groups={self.norm_groups}, "
                f"got {self.base_channels}"
            )
        self._check_codebook()
        self._check_resolutions()

    def _check_codebook(self) -> None:
        if (self.codebook_size is not None) != (self.regularization == "vq"):
            raise ValueError(
                f'FirstStageConfig.codebook_size must be given exactly for regularization "vq", '
                f"got {self.codebook_size} with {self.regularization!r}"
            )
        check_at_least(self, 2, "codebook_size")

    def _check_resolutions(self) -> None:
        sizes = [self.trained_at_resolution // 2**level for level in range(len(self.channel_mult))]
        if unknown := sorted(set(self.attention_resolutions) - set(sizes)):
            raise ValueError(
                f"FirstStageConfig.attention_resolutions must be sizes of feature maps, {sizes}, got {unknown}"
            )
        if self.trained_at_resolution < 1 or self.trained_at_resolution % self.downsampling_factor:
            raise ValueError(
                f"FirstStageConfig.trained_at_resolution must be a multiple of the downsampling factor "
                f"{self.downsampling_factor}, got {self.trained_at_resolution}"
            )

    @property
    def downsampling_factor(self) -> int:
        """f = H / h, the ratio of an image's side to its latent's."""
        return 2 ** (len(self.channel_mult) - 1)

    def level_has_attention(self, level: int) -> bool:
        """Return whether attention follows the residual blocks at H / 2**level."""
        return self.trained_at_resolution // 2**level in self.attention_resolutions
