"""A recipe's `condition`: what the model is conditioned on. Imported without torch."""

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from ldm_core.configs.parameter_count import text_transformer_parameters
from ldm_core.configs.text import TextTransformerConfig
from pipelines.config import Config, runtime
from pipelines.errors import UserError

Sections = Mapping[str, Any]


class ConditionBase(Config):
    """What a plan asks of every kind.

    Attributes:
        kind: the kind's name, in every key.
        cached: the settings that decide what latents cache. The others are left out of their key, so that latents stay
            cached when they change.
        needs_captions: whether a picture without a caption is no sample.
        follows_geometry: whether what is cached would not fit a mirrored or cropped picture.
        local_inputs: dotted settings that may name files of the submitting machine.
    """

    cached: ClassVar[tuple[str, ...]] = ()
    needs_captions: ClassVar[bool] = False
    follows_geometry: ClassVar[bool] = False
    local_inputs: ClassVar[tuple[str, ...]] = ()

    kind: str

    def cached_identity(self) -> dict[str, Any]:
        """Return what enters the key of the latents, as `identity` does for the key of the model."""
        return {name: value for name, value in self.identity().items() if name in ("kind", *self.cached)}

    def inputs(self) -> dict[str, str]:
        """Return digests of the files that decide what is cached."""
        return {}

    def check_pairs(self, sections: Sections) -> None:
        """Raise ValueError if the recipe's pairs do not carry what this kind needs."""
        if self.needs_captions and sections["pairs"].captions != "required":
            raise ValueError(
                f"condition {self.kind} needs a caption with every picture: set pairs.captions to required, "
                f"got {sections['pairs'].captions}"
            )

    def check_model(self, sections: Sections) -> None:
        """Raise ValueError if the UNet does not take what this kind gives."""

    def check_guidance(self, guidance_scale: float, field: str) -> None:
        """Raise ValueError if sampling cannot be guided as a field says."""
        # Guidance away from what was never trained.
        if guidance_scale != 1 and getattr(self, "dropout", None) == 0:
            raise ValueError(f"{field} must be 1 for a model trained with condition.dropout=0, got {guidance_scale}")

    def bytes_a_sample(self) -> int:
        """Return about how many bytes are cached of a sample."""
        return 0

    def parameters(self) -> int:
        """Return how many weights this kind adds to the model."""
        return 0


class NoCondition(ConditionBase):
    """An unconditional model: pictures need no captions, and nothing is cached but latents."""

    kind: Literal["none"]

    def check_model(self, sections: Sections) -> None:
        if (width := sections["diffusion"].unet.context_dim) is not None:
            raise ValueError(f"diffusion.unet.context_dim must be null for condition none, got {width}")


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


class TransformerConfig(Config):
    """The jointly trained text transformer; its vocabulary and caption length are the tokenizer's.

    Args:
        width, layers, heads, head_dim, embedding_std: its shape, see `ldm_core.configs.text`.
        mask_padding: whether the UNet attends to the words of a caption alone; published models attend to padding too.
    """

    width: int = Field(1280, ge=8)
    layers: int = Field(32, ge=1)
    heads: int = Field(8, ge=1)
    head_dim: int = Field(64, ge=8)
    embedding_std: float = Field(0.02, gt=0)
    mask_padding: bool = False

    def build(self, *, vocabulary_size: int, max_length: int, pad_id: int = 0) -> TextTransformerConfig:
        """Return the text transformer's configuration for a tokenizer."""
        return TextTransformerConfig(
            vocabulary_size=vocabulary_size,
            max_length=max_length,
            pad_id=pad_id if self.mask_padding else None,
            **self.model_dump(exclude={"mask_padding"}),
        )


class TextCondition(ConditionBase):
    """Captions, through a text transformer that is trained together with the UNet (paper, Sec. 4.3.1).

    Args:
        tokenizer: captions to token ids, which latents cache.
        transformer: size of the text transformer.
        dropout: share of samples whose caption is replaced by the empty one, for classifier-free guidance.
    """

    cached = ("tokenizer",)
    needs_captions = True
    local_inputs = ("tokenizer.vocabulary",)

    kind: Literal["text"]
    tokenizer: TokenizerConfig = TokenizerConfig()
    transformer: TransformerConfig = TransformerConfig()
    dropout: float = Field(0.1, ge=0, le=1)

    def inputs(self) -> dict[str, str]:
        # Imported on call: a recipe is read without the store's libraries.
        from pipelines.conditions.vocabulary import vocabulary_digest

        return vocabulary_digest(self.tokenizer)

    def check_model(self, sections: Sections) -> None:
        if (width := sections["diffusion"].unet.context_dim) != self.transformer.width:
            raise ValueError(
                f"diffusion.unet.context_dim must be condition.transformer.width, {self.transformer.width}, got {width}"
            )

    def bytes_a_sample(self) -> int:
        return 2 * self.tokenizer.max_length

    def parameters(self) -> int:
        tokenizer = self.tokenizer
        return text_transformer_parameters(
            self.transformer.build(vocabulary_size=tokenizer.size, max_length=tokenizer.max_length)
        )


class TextEncoderConfig(Config):
    """A pretrained text encoder. Its files' sha256 are part of the key, their path is not.

    Args:
        path: a folder of the transformers library (weights, config.json, tokenizer); or, of OpenCLIP, the weights file.
            On every node.
        open_clip: open_clip's name of the architecture, such as ViT-H-14.
        unused_layers: number of last layers of an OpenCLIP to skip; Stable Diffusion 2 skips one.
        max_length: tokens per caption; longer captions are cut. None is the encoder's longest; a CLIP has no other.
    """

    path: str = runtime(min_length=1)
    open_clip: str | None = None
    unused_layers: int = Field(0, ge=0)
    max_length: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _of_open_clip(self) -> "TextEncoderConfig":
        if "://" in self.path:
            raise ValueError(f"path must be a folder or file on every node, got {self.path}: copy it there")
        if self.unused_layers and self.open_clip is None:
            raise ValueError("unused_layers is of an OpenCLIP: name its architecture in open_clip")
        return self

    def files(self) -> list[Path]:
        """Return the files that decide what the encoder computes. Raises UserError if they are not there."""
        path = Path(self.path).expanduser()
        found = [path] if self.open_clip else [file for file in sorted(path.glob("*")) if _ENCODER_FILES(file.name)]
        if not found or not all(file.is_file() for file in found):
            wanted = "the weights file of an OpenCLIP" if self.open_clip else "the folder of a text encoder"
            raise UserError(f"no {path}: condition.encoders must name {wanted}")
        return found


_ENCODER_FILES = re.compile(r".*\.(json|txt|safetensors|bin)").fullmatch


class FrozenTextCondition(ConditionBase):
    """Captions, through one or two pretrained text encoders that are never trained (Stable Diffusion, Imagen, SDXL).

    Args:
        encoders: the encoders. Of two, which must take as many tokens of a caption, the UNet is fed both side by side:
            its context is as wide as both together.
        dropout: share of samples whose caption is replaced by the empty one, for classifier-free guidance.
    """

    cached = ("encoders",)
    needs_captions = True
    local_inputs = ("encoders.0.path", "encoders.1.path")

    kind: Literal["frozen_text"]
    encoders: tuple[TextEncoderConfig, ...] = Field(min_length=1, max_length=2)
    dropout: float = Field(0.1, ge=0, le=1)

    def inputs(self) -> dict[str, str]:
        # As above.
        from pipelines.store.storage import sha256_file

        return {
            f"text_encoder/{number}/{file.name if not encoder.open_clip else 'weights'}": sha256_file(file)
            for number, encoder in enumerate(self.encoders)
            for file in encoder.files()
        }

    def check_model(self, sections: Sections) -> None:
        lengths = [_longest(encoder) for encoder in self.encoders]
        known = [length for length in lengths if length is not None]
        if len(set(known)) > 1:
            raise ValueError(
                f"condition.encoders must take as many tokens of a caption, got {' and '.join(map(str, known))}: set "
                f"max_length: {min(known)} for the one that takes more"
            )
        widths = [_width(encoder) for encoder in self.encoders]
        found = sections["diffusion"].unet.context_dim
        if None not in widths and found != (wanted := sum(width or 0 for width in widths)):
            of = "the text encoder's width" if len(widths) == 1 else "the sum of the text encoders' widths"
            raise ValueError(f"diffusion.unet.context_dim must be {of}, {wanted}, got {found}")

    def parameters(self) -> int:
        files = [file for encoder in self.encoders if not encoder.open_clip for file in encoder.files()]
        return sum(file.stat().st_size // 4 for file in files if file.suffix in (".safetensors", ".bin"))

    def bytes_a_sample(self) -> int:
        return sum(2 * _tokens(encoder) * (_width(encoder) or 1024) for encoder in self.encoders)


def _tokens(config: TextEncoderConfig) -> int:
    """Return about how many states are stored of a caption: of a CLIP all, of others those of twenty tokens."""
    clip = config.open_clip is not None or "clip" in str(_settings(config).get("model_type", ""))
    return 77 if clip else 20


def _settings(config: TextEncoderConfig) -> dict[str, Any]:
    path = Path(config.path).expanduser() / "config.json"
    if config.open_clip is not None or not path.is_file():
        return {}
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def _width(config: TextEncoderConfig) -> int | None:
    """Return the width of what an encoder gives; None if its files do not say."""
    settings = _settings(config)
    settings = settings.get("text_config", settings)
    width = settings.get("hidden_size") or settings.get("d_model")
    return width if isinstance(width, int) else None


def _longest(config: TextEncoderConfig) -> int | None:
    """Return how many tokens an encoder takes of a caption; None if its files do not say."""
    settings = _settings(config)
    longest = config.max_length or settings.get("text_config", settings).get("max_position_embeddings")
    return longest if isinstance(longest, int) else None


def _once(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a class that is named twice: one of its embeddings would never be trained."""
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise ValueError(f"classes must differ, but {twice[0]!r} is named twice: leave one out")
    return classes


class ClassCondition(ConditionBase):
    """A class label for every picture, one learned embedding each, as wide as the UNet's context (paper, Table 15).

    Args:
        column: the column of the source that names the class: text or whole numbers.
        classes: names of the classes, in the order of their embeddings; None takes those that the pairs have, sorted.
        dropout: share of samples whose class is replaced by "no class", for classifier-free guidance; 0 trains a model
            without that class, which cannot be guided.
    """

    cached = ("column", "classes")

    kind: Literal["class"]
    column: str = "label"
    classes: Annotated[tuple[str, ...], AfterValidator(_once)] | None = Field(None, min_length=1)
    dropout: float = Field(0.1, ge=0, le=1)

    def check_model(self, sections: Sections) -> None:
        if sections["diffusion"].unet.context_dim is None:
            raise ValueError("diffusion.unet.context_dim must be the width of a class's embedding, got null: set it")

    def bytes_a_sample(self) -> int:
        return 4


class CacheOnlyCondition(ConditionBase):
    """A condition that latents are cached for, in their final form, and that no model is trained on yet."""

    follows_geometry = True

    def check_model(self, sections: Sections) -> None:
        raise ValueError(
            f"condition {self.kind}: its latents are cached, but nothing is trained on them: add --to latents"
        )


class LayoutCondition(CacheOnlyCondition):
    """Labelled boxes (paper, Sec. 4.3.1).

    Args:
        column: the column of the source with a list of `{"bbox": [x, y, width, height], "category": NAME}`, in pixels
            of the source's picture; `label` will do for `category`.
        classes: names of the classes, in the order of their numbers.
    """

    cached = ("column", "classes")

    kind: Literal["layout"]
    column: str = "boxes"
    classes: Annotated[tuple[str, ...], AfterValidator(_once)] = Field(min_length=1)

    def check_pairs(self, sections: Sections) -> None:
        if sections["pairs"].resize == "border":
            raise ValueError("condition layout: pairs.resize must not be border, which moves boxes: take another")

    def bytes_a_sample(self) -> int:
        return 20 * 8


class SemanticMapCondition(CacheOnlyCondition):
    """A class for every pixel, from `KEY.map.png` of the pairs (paper, Sec. 4.3.2).

    Args:
        classes: number of classes, 0 to classes - 1.
    """

    cached = ("classes",)

    kind: Literal["semantic_map"]
    classes: int = Field(ge=1, le=256)

    def bytes_a_sample(self) -> int:
        return 4_000


class LowResolutionCondition(CacheOnlyCondition):
    """The picture itself at the latent's size (paper, Sec. 4.4).

    Args:
        factor: how many times smaller it is, the first stage's downsampling factor.
    """

    cached = ("factor",)

    kind: Literal["low_resolution"]
    factor: int = Field(4, ge=2)

    def check_pairs(self, sections: Sections) -> None:
        wanted = sections["autoencoder"].model.downsampling_factor
        if self.factor != wanted:
            raise ValueError(
                f"condition.factor must be the first stage's downsampling factor, {wanted}, got {self.factor}"
            )

    def bytes_a_sample(self) -> int:
        return 3 * 64 * 64


class MaskedImageCondition(CacheOnlyCondition):
    """The picture without what is under a mask (paper, Sec. 4.5).

    Args:
        masks: how many masks are drawn for each picture.
    """

    cached = ("masks",)

    kind: Literal["masked_image"]
    masks: int = Field(4, ge=1, le=64)

    def bytes_a_sample(self) -> int:
        return self.masks * 2 * 4 * 32 * 32


def _by_name(value: Any) -> Any:
    """Expand `class` to `{kind: class}`; a mapping without a kind is of text, as all recipes of version 0.1 are."""
    named = {"kind": value} if isinstance(value, str) else value
    if not isinstance(named, dict):
        return value
    named = {"kind": "text", **named}
    if named["kind"] not in CONFIGS:
        near = difflib.get_close_matches(str(named["kind"]), CONFIGS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(CONFIGS)}"
        raise ValueError(f"no kind of condition {named['kind']!r}; {hint}")
    return named


def _tag(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


# Not discriminated by the field itself, which a validator of all fields looks at first.
Condition = Annotated[
    Annotated[NoCondition, Tag("none")]
    | Annotated[TextCondition, Tag("text")]
    | Annotated[FrozenTextCondition, Tag("frozen_text")]
    | Annotated[ClassCondition, Tag("class")]
    | Annotated[LayoutCondition, Tag("layout")]
    | Annotated[SemanticMapCondition, Tag("semantic_map")]
    | Annotated[LowResolutionCondition, Tag("low_resolution")]
    | Annotated[MaskedImageCondition, Tag("masked_image")],
    Discriminator(
        _tag, custom_error_type="condition", custom_error_message="must be a kind of condition, or `kind` and settings"
    ),
    BeforeValidator(_by_name),
]
CONFIGS: Mapping[str, type[ConditionBase]] = {
    "none": NoCondition,
    "text": TextCondition,
    "frozen_text": FrozenTextCondition,
    "class": ClassCondition,
    "layout": LayoutCondition,
    "semantic_map": SemanticMapCondition,
    "low_resolution": LowResolutionCondition,
    "masked_image": MaskedImageCondition,
}
