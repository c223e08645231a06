"""Configurations of text encoders: trained jointly with the UNet (paper, Appendix E.2.1: tau_theta), or frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ldm_core.configs.values import check_at_least


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """Shape of a text transformer; the defaults are the paper's.

    Args:
        vocabulary_size: number of token ids.
        max_length: longest token sequence, L.
        width: D of the context.
        layers: number of transformer layers.
        heads: number of attention heads.
        head_dim: channels of a head; heads * head_dim need not equal the width.
        embedding_std: standard deviation of the initial embeddings; with 1 a small model learns what words mean in
            fewer steps.
        pad_id: id of the padding token, which the UNet then does not attend to; None if it does, as published. The
            transformer itself attends to all.

    Raises:
        ValueError: a field is not positive.
    """

    vocabulary_size: int
    max_length: int = 77
    width: int
    layers: int
    heads: int = 8
    head_dim: int = 64
    embedding_std: float = 0.02
    pad_id: int | None = None

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    @property
    def mask_padding(self) -> bool:
        """Whether the UNet does not attend to padding."""
        return self.pad_id is not None

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "max_length", "width", "layers", "heads", "head_dim", "embedding_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"TextTransformerConfig.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Shape of a CLIP text transformer; the defaults are those of ViT-L/14.

    Args:
        vocabulary_size: number of token ids.
        max_length: longest token sequence, L.
        width: D of the context.
        layers: number of transformer layers.
        heads: number of attention heads; they divide the width.
        feed_forward_width: width of the hidden layer of the feed-forward networks.
        activation: "quick_gelu", x sigmoid(1.702 x), of OpenAI's models; "gelu", of most of OpenCLIP's.
        unused_layers: number of last layers to skip; the final norm still follows.

    Raises:
        ValueError: a number is out of range.
    """

    vocabulary_size: int = 49_408
    max_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward_width: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    unused_layers: int = 0

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "vocabulary_size", "max_length", "width", "layers", "heads", "feed_forward_width")
        if self.width % self.heads:
            raise ValueError(f"ClipTextConfig.width must be a multiple of heads={self.heads}, got {self.width}")
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f'ClipTextConfig.activation must be "quick_gelu" or "gelu", got {self.activation!r}')
        if not 0 <= self.unused_layers < self.layers:
            raise ValueError(
                f"ClipTextConfig.unused_layers must be from 0 to {self.layers - 1}, got {self.unused_layers}"
            )


@dataclass(frozen=True, kw_only=True)
class FrozenTextConfig:
    """Shape of a text encoder of the transformers library.

    Args:
        architecture: the content of its config.json, with `model_type`.
        width: D of the context, the encoder's hidden size.
        max_length: longest token sequence, L.
        pad_id: id of the padding token, which the encoder does not attend to; None if it attends to padding.
        mask_padding: whether the UNet does not attend to padding either; published models do.

    Raises:
        ValueError: no `model_type`, a number is not positive, or padding is masked that is not known.
    """

    architecture: Mapping[str, Any] = field(hash=False)
    width: int
    max_length: int
    pad_id: int | None = 0
    mask_padding: bool = False

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.mask_padding and self.pad_id is None:
            raise ValueError("FrozenTextConfig.mask_padding needs pad_id, the id of the padding token, got None")
        if "model_type" not in self.architecture:
            raise ValueError("FrozenTextConfig.architecture must be the encoder's config.json, it has no 'model_type'")
        check_at_least(self, 1, "width", "max_length")


@dataclass(frozen=True, kw_only=True)
class JoinedTextConfig:
    """Several frozen text encoders side by side: a place of the context is what each gives for its token there (SDXL).

    Args:
        encoders: two or more of them. They may cut captions into different tokens, but into as many.

    Raises:
        ValueError: fewer than two, or captions of different lengths.
    """

    encoders: tuple[ClipTextConfig | FrozenTextConfig, ...]

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if len(self.encoders) < 2:
            raise ValueError(f"JoinedTextConfig.encoders must be two or more, got {len(self.encoders)}")
        if len(lengths := {encoder.max_length for encoder in self.encoders}) > 1:
            found = " and ".join(str(encoder.max_length) for encoder in self.encoders)
            raise ValueError(
                f"text encoders side by side must take as many tokens of a caption, got max_length {found}: set it to "
                f"{min(lengths)} for all"
            )

    @property
    def width(self) -> int:
        """D of the context."""
        return sum(encoder.width for encoder in self.encoders)

    @property
    def max_length(self) -> int:
        """Longest token sequence, L."""
        return self.encoders[0].max_length

    @property
    def mask_padding(self) -> bool:
        """Whether the UNet does not attend to places that are padding for all encoders."""
        return all(isinstance(encoder, FrozenTextConfig) and encoder.mask_padding for encoder in self.encoders)


# Of encoders that are never trained.
FrozenConfig = ClipTextConfig | FrozenTextConfig | JoinedTextConfig
