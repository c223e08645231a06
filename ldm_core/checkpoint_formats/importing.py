"""Open any checkpoint that we can read as a model of ours: `ldm_core.load` builds it, `ldm import` writes our folder.

>>> from ldm_core import checkpoint
>>> from ldm_core.checkpoint_formats.importing import open_checkpoint
>>> found = open_checkpoint("model.ckpt", preset="txt2img-1p4b")
>>> checkpoint.write(found.config, found.weights, "FOLDER", tokenizer=found.tokenizer)
"""

from __future__ import annotations

from pathlib import Path

import torch

from ldm_core import checkpoint, presets
from ldm_core.checkpoint_formats import compvis, diffusers
from ldm_core.checkpoint_formats.imported import Imported
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import Config, takes_captions
from ldm_core.configs.text import ClipTextConfig, TextTransformerConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.model_files import CONFIG_FILE, TOKENIZER_FILE, VOCABULARY_FILE, WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from ldm_core.tokenizers.clip import CLIP_END, open_clip_tokenizer
from ldm_core.tokenizers.from_folder import tokenizer_from_folder
from ldm_core.tokenizers.joined import AnyTokenizer
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.weights.weights_files import open_tensors, read_json

RELEASE_CHECKPOINTS = ("*.ckpt", "*.safetensors", "*.pt")
RELEASE_CONFIGS = ("*.yaml", "*.yml", CONFIG_FILE)


def load(
    source: str | Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    device: torch.device | str | None = None,
) -> LatentDiffusion:
    """Build the model of any checkpoint, or of a folder of ours; see `ldm_core.load`."""
    if _is_ours(Path(source), preset, config):
        return checkpoint.load(source, device=device)
    found = open_checkpoint(source, preset=preset, config=config)
    if isinstance(found.config, FirstStageConfig):
        raise ValueError(f"{source} holds a first stage alone, no model: `ldm import` makes of it what a recipe takes")
    return checkpoint.model_with(found.config, found.weights, device=device)


def load_tokenizer(source: str | Path, *, preset: str | None = None, config: str | Path | None = None) -> AnyTokenizer:
    """Read the tokenizer of any checkpoint, or of a folder of ours; see `ldm_core.load_tokenizer`."""
    if _is_ours(Path(source), preset, config):
        return checkpoint.load_tokenizer(source)
    found = open_checkpoint(source, preset=preset, config=config)
    if found.tokenizer is None:
        raise ValueError(
            f"{source} comes without a tokenizer: put its {VOCABULARY_FILE} or {TOKENIZER_FILE} beside it"
            if takes_captions(found.config)
            else f"the model in {source} takes no captions: sample it without a prompt"
        )
    return found.tokenizer


def open_checkpoint(
    source: str | Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    weights: compvis.Weights | None = None,
    tokenizer: str | Path | None = None,
) -> Imported:
    """Identify a checkpoint and open its weights under our names; each is read only when it is asked for.

    Args:
        source: a file of the code release (.ckpt, .safetensors), a folder with such a file and its configuration, or
            a folder of diffusers.
        preset: name of the published model or first stage in a file of the release; None takes the configuration beside
            it (model.yaml beside model.ckpt, or config.yaml if no other checkpoint is there) or infers the preset from
            the weights' names and shapes.
        config: configuration to use instead of a preset: a YAML file as the release has it, or a config.json of ours.
        weights: which weights to take from a file of the release, see `compvis.import_checkpoint`.
        tokenizer: a vocab.txt, a tokenizer.json, or a folder with either, for a model of captions that comes without.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the checkpoint is damaged, unknown or not what it is said to be; one line, with the names.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"no checkpoint at {source}")
    if _holds_our_weights(source):
        raise ValueError(f"{source} is a model folder of ours already: use it as it is")
    if _is_diffusers(source):
        if preset or config or weights:
            raise ValueError(
                f"{source} is a folder of diffusers, which says itself what it is: give no preset, config or weights"
            )
        found = diffusers.import_folder(source)
    else:
        found = _open_release(source, preset, config, weights)
    return found.with_tokenizer(_tokenizer(found.config, tokenizer, source) or found.tokenizer)


def _is_ours(source: Path, preset: str | None, config: str | Path | None) -> bool:
    if not _holds_our_weights(source):
        return False
    if preset or config:
        raise ValueError(
            f"{source} is a model folder of ours, which says itself what it is: give no preset and no config"
        )
    return True


def _holds_our_weights(source: Path) -> bool:
    return any((source / name).is_file() for name in (WEIGHTS_FILE, WEIGHTS_INDEX_FILE))


def _is_diffusers(source: Path) -> bool:
    if not source.is_dir():
        return False
    if (source / diffusers.INDEX_FILE).is_file():
        return True
    return (source / CONFIG_FILE).is_file() and "_class_name" in read_json(source / CONFIG_FILE)


def _open_release(
    source: Path, preset: str | None, config_file: str | Path | None, weights: compvis.Weights | None
) -> Imported:
    if source.is_dir():
        files = _matches(source, RELEASE_CHECKPOINTS)
        configs = [config_file] if config_file else _matches(source, RELEASE_CONFIGS)
        if len(files) != 1:
            raise ValueError(
                f"{source} must be a folder of diffusers, or hold one checkpoint of the code release, "
                f"it holds {', '.join(file.name for file in files) or 'none'}"
            )
        source = files[0]
        # Among several configurations the caller must choose.
        config_file = configs[0] if len(configs) == 1 and not preset else config_file
    elif not (preset or config_file):
        beside = [source.with_suffix(".yaml"), source.with_suffix(".yml")]
        # In a folder of downloads config.yaml may be another model's.
        if len(_matches(source.parent, RELEASE_CHECKPOINTS)) == 1:
            beside.append(source.with_name("config.yaml"))
        config_file = next((path for path in beside if path.is_file()), None)
    tensors = open_tensors(source)
    if config_file and preset:
        raise ValueError(f"a checkpoint is of one kind: give preset {preset!r} or config {config_file}, not both")
    if config_file:
        config, origin = compvis.load_configuration(config_file), str(config_file)
    else:
        name = preset or compvis.infer_preset(tensors)
        config, origin = _preset(name, compvis.holds_whole_model(tensors)), name
    config, ours, averaged = compvis.import_checkpoint(tensors, config, weights=weights)
    kind = "averaged" if averaged else "raw"
    return Imported(f"{origin} ({kind} weights)", config, ours)


def _preset(name: str, whole: bool) -> Config:
    # A preset of the wrong kind passes: `import_checkpoint` compares the kinds, and its error is the better one.
    if name in presets.FIRST_STAGE_CONFIGS and (not whole or name not in presets.MODEL_CONFIGS):
        return presets.first_stage(name)
    return presets.get(name)


def _matches(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _tokenizer(config: Config, path: str | Path | None, source: Path) -> Tokenizer | None:
    """Find the tokenizer of a model of captions: the given one, one beside the checkpoint, or the published CLIP's."""
    if not takes_captions(config):
        if path:
            raise ValueError(f"only a model of captions has a tokenizer, this one takes none: leave out {path}")
        return None
    text = config.conditioner  # type: ignore[union-attr]
    max_length: int = text.max_length  # type: ignore[union-attr]
    folder = source if source.is_dir() else source.parent
    # A folder of downloads may hold BERT's vocabulary beside a model that reads with CLIP's.
    names = (TOKENIZER_FILE,) if isinstance(text, ClipTextConfig) else (VOCABULARY_FILE, TOKENIZER_FILE)
    beside = [folder / name for name in names if (folder / name).is_file()]
    if path is None and beside:
        path = beside[0]
    if path is None:
        return _published_clip_tokenizer(text) if isinstance(text, ClipTextConfig) else None
    path = Path(path)
    # Folders of BERT's tokenizer often hold a tokenizer.json as well: the vocabulary says all, and is smaller.
    if path.is_dir() and isinstance(text, TextTransformerConfig) and (path / VOCABULARY_FILE).is_file():
        path = path / VOCABULARY_FILE
    if path.is_dir():
        return tokenizer_from_folder(path, max_length=max_length)
    if path.suffix == ".json":
        return Tokenizer.from_json_file(path, max_length=max_length)
    return Tokenizer.from_vocabulary_file(path, max_length=max_length)


def _published_clip_tokenizer(text: ClipTextConfig) -> Tokenizer | None:
    """Return OpenAI's tokenizer, from the open_clip package; None without the package or for another vocabulary."""
    try:
        theirs = open_clip_tokenizer(max_length=text.max_length)
    except ImportError:
        return None
    if theirs.vocabulary_size != text.vocabulary_size:
        return None
    # OpenCLIP pads with "!", OpenAI's model was trained with the end token.
    return theirs.with_pad_token(CLIP_END)
