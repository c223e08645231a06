"""Captions through a pretrained text encoder that is never trained (Imagen and Stable Diffusion; cf. paper, Sec. 3.3).

CLIP's text transformer is our own (`networks.clip_text`); any other encoder is the transformers library's, wrapped.
Their weights come from the model's own file, or from `pretrained`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm_core.conditioning.interface import Conditioner, Conditioning
from ldm_core.configs.text import ClipTextConfig, FrozenTextConfig, JoinedTextConfig
from ldm_core.networks.clip_text import ClipTextTransformer
from ldm_core.networks.ids import check_tokens


class _Frozen(Conditioner):
    """A conditioner without gradients that stays in evaluation mode, whatever the model's mode."""

    def freeze(self) -> None:
        """Switch gradients off and evaluation mode on."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> _Frozen:
        super().train(False)
        return self


class FrozenClipConditioner(_Frozen):
    """Maps token ids (B, L) of captions to CLIP's context (B, L, D)."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = ClipTextTransformer(config)
        self.freeze()

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Conditioning:
        """Ids (B, L) of any integer type -> context (B, L, D). Raises ValueError as the transformer does."""
        return Conditioning(context=self.transformer(tokens))


class FrozenTextConditioner(_Frozen):
    """Maps token ids (B, L) of captions to the last hidden states (B, L, D) of an encoder of the transformers library.

    Raises:
        ValueError: the library does not know the architecture, or its hidden size is not the config's width.
    """

    def __init__(self, config: FrozenTextConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _build_encoder(config)
        self.freeze()

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Conditioning:
        """Ids (B, L) of any integer type -> context (B, L, D), with the mask (B, L) of real tokens if it is configured.

        Raises:
            ValueError: tokens are not integers of that shape, or more than `max_length` a caption.
        """
        config = self.config
        tokens = check_tokens(tokens, max_length=config.max_length)
        attended = torch.ones_like(tokens) if config.pad_id is None else (tokens != config.pad_id).long()
        # In a caption that is all padding, the softmax would run over nothing.
        attended[:, 0] = 1
        context = self.encoder(input_ids=tokens, attention_mask=attended).last_hidden_state
        return Conditioning(context=context, mask=attended.bool() if config.mask_padding else None)


class JoinedTextConditioner(_Frozen):
    """Maps token ids (B, N, L) of captions, by the tokenizers of N encoders, to one context (B, L, D1 + ... + DN).

    What an encoder does not attend to is zero there; the UNet attends to places that any encoder attends to.

    Args:
        config: of the encoders.
        encoders: their conditioners; None builds them with random weights.
    """

    def __init__(
        self,
        config: JoinedTextConfig,
        encoders: Sequence[FrozenClipConditioner | FrozenTextConditioner] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList(encoders or [_build(each) for each in config.encoders])
        self.freeze()

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Conditioning:
        """Ids (B, N, L) of any integer type -> context (B, L, D1 + ... + DN), with a mask (B, L) if all encoders mask.

        Raises:
            ValueError: tokens are not of that shape, or as an encoder does.
        """
        if tokens.ndim != 3 or tokens.shape[1] != len(self.encoders):
            raise ValueError(
                f"tokens must have the shape (B, {len(self.encoders)}, L), those of each encoder's tokenizer, "
                f"got {tuple(tokens.shape)}"
            )
        given = [_real_first(encoder(ids)) for encoder, ids in zip(self.encoders, tokens.unbind(1), strict=True)]
        context = torch.cat([each.context for each in given if each.context is not None], dim=2)
        masks = [each.mask for each in given if each.mask is not None]
        return Conditioning(context=context, mask=torch.stack(masks).any(0) if len(masks) == len(given) else None)


def _real_first(given: Conditioning) -> Conditioning:
    """Move what is attended to before all else, as it is cached, and set the rest to zero."""
    if given.mask is None or given.context is None:
        return given
    order = (~given.mask).long().argsort(dim=1, stable=True)
    mask = given.mask.gather(1, order)
    context = given.context.gather(1, order[..., None].expand_as(given.context))
    # Not by a product: of an encoder in half precision, what is not attended to may be infinite.
    return Conditioning(context=context.masked_fill(~mask[..., None], 0), mask=mask)


def _build(config: ClipTextConfig | FrozenTextConfig) -> FrozenClipConditioner | FrozenTextConditioner:
    return FrozenClipConditioner(config) if isinstance(config, ClipTextConfig) else FrozenTextConditioner(config)


def _build_encoder(config: FrozenTextConfig) -> nn.Module:
    # Imported on call: the library is optional.
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    settings = dict(config.architecture)
    kind = settings.pop("model_type")
    try:
        architecture = AutoConfig.for_model(kind, **settings)
    except ValueError as error:
        raise ValueError(f"transformers must know the text encoder, it has no model_type {kind!r}") from error
    hidden = getattr(architecture, "hidden_size", None) or getattr(architecture, "d_model", None)
    if hidden != config.width:
        raise ValueError(f"the text encoder's hidden size must be the context's width {config.width}, got {hidden}")
    # Of encoder-decoder models (T5) the encoder alone.
    auto = AutoModelForTextEncoding if getattr(architecture, "is_encoder_decoder", False) else AutoModel
    encoder: nn.Module = auto.from_config(architecture)
    return encoder
