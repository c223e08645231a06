"""CLIP for CMMD, CLIP-FD and CLIP score: embeddings of images and captions, by transformers or open_clip.

Shapes: images: (B, 3, H, W) in [-1, 1]; embeddings: (B, D), not normalised.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_core.metrics.networks.weights import MetricUnavailableError, digest_of_files
from ldm_core.metrics.preprocessing import crop_for_clip, quantize

CONTENT = "a CLIP folder (config.json with model.safetensors, or open_clip_config.json with its weights)"
SOURCE = "https://huggingface.co/openai/clip-vit-large-patch14-336"
# Mean and standard deviation of CLIP's training pictures, used unless the folder's preprocessor gives others.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A CLIP model, loaded by `load_clip`.

    Args:
        encode_image: (B, 3, size, size) normalised pixels -> (B, D).
        encode_text: captions -> (B, D); None if the folder has no tokenizer.
        size: height and width of the pictures that the network takes.
        mean, std: normalisation of the three channels, on pixels from 0 to 1.
        digest: sha256 in hex of the files that determine the embeddings.
        device: device the network is on.
        resize: name of the preprocessing, recorded with every result.
    """

    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Sequence[str]], Tensor] | None
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    device: torch.device
    resize: str = "clip"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, D) float32 embeddings of (B, 3, H, W) images in [-1, 1], on the network's device."""
        pixels = crop_for_clip(quantize(images.to(self.device)), self.size) / 255
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        with torch.autocast(self.device.type, enabled=False):
            return self.encode_image((pixels - mean) / std).float()

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Return (B, D) float32 embeddings of captions, each cut to the model's context length.

        Raises:
            MetricUnavailableError: if the folder has no tokenizer.
        """
        if self.encode_text is None:
            raise MetricUnavailableError("the CLIP folder has no tokenizer: put tokenizer.json beside its weights")
        with torch.autocast(self.device.type, enabled=False):
            return self.encode_text(captions).float()


def load_clip(folder: Path, *, device: torch.device | str = "cpu") -> Clip:
    """Read a CLIP model from a folder in the layout of the model hubs; nothing is downloaded.

    Args:
        folder: either config.json, preprocessor_config.json, the weights and the tokenizer files of transformers'
            CLIPModel, or open_clip_config.json and the weights of open_clip.
        device: device to run on.

    Returns:
        The model with float32 weights.

    Raises:
        MetricUnavailableError: if the folder, its weights or the library that reads them is missing.
        ValueError: if the folder holds another model, or weights that do not fit its config.
    """
    folder, device = Path(folder), torch.device(device)
    for config, load in (("config.json", _from_transformers), ("open_clip_config.json", _from_open_clip)):
        path = folder / config
        weights = _weights_files(folder, open_clip=load is _from_open_clip)
        if path.is_file() and weights:
            preprocessor = [file for file in [folder / "preprocessor_config.json"] if file.is_file()]
            return load(folder, device, digest_of_files([path, *weights, *preprocessor]))
    raise MetricUnavailableError(f"{folder} is not {CONTENT}")


def _weights_files(folder: Path, *, open_clip: bool) -> list[Path]:
    """Return the files that the library will read, by its own order of preference: they are what is digested."""
    stem = "open_clip_" if open_clip else ""
    patterns = (f"{stem}model*.safetensors", f"{stem}pytorch_model*.safetensors", f"{stem}pytorch_model*.bin")
    return next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])


def _from_transformers(folder: Path, device: torch.device, digest: str) -> Clip:
    try:
        # Lazy: transformers is optional here.
        from transformers import CLIPModel
    except ImportError as error:
        raise MetricUnavailableError("the library transformers is missing: pip install transformers") from error
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"{folder / 'config.json'} must be of model_type 'clip', got {kind!r}: give a CLIP folder")
    with torch.random.fork_rng(devices=[]):
        loaded: Any = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"the weights in {folder} must be whole, without {missing[:3]}: fetch it anew")
    model = model.to(device).eval()
    tokenizer: Any = None
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    length = model.config.text_config.max_position_embeddings

    def encode_image(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def encode_text(captions: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(device)
        # No attention mask is needed: attention is causal, and the embedding is read where the caption ends.
        hidden = model.text_model(input_ids=tokens.input_ids)
        return model.text_projection(hidden.pooler_output)

    preprocessor = _read_json(folder / "preprocessor_config.json")
    return Clip(
        encode_image=encode_image,
        encode_text=encode_text if tokenizer is not None else None,
        size=model.config.vision_config.image_size,
        mean=tuple(preprocessor.get("image_mean", MEAN)),
        std=tuple(preprocessor.get("image_std", STD)),
        digest=digest,
        device=device,
    )


def _from_open_clip(folder: Path, device: torch.device, digest: str) -> Clip:
    try:
        # Lazy: open_clip is optional here.
        import open_clip
    except ImportError as error:
        raise MetricUnavailableError("the library open_clip is missing: pip install open_clip_torch") from error
    config = _read_json(folder / "open_clip_config.json").get("model_cfg", {})
    if "hf_model_name" in config.get("text_cfg", {}):
        raise ValueError(f"{folder} must hold CLIP's own text tower, got one by hub name: give another folder")
    name = f"local-dir:{folder}"
    try:
        with torch.random.fork_rng(devices=[]):
            model = open_clip.create_model(name, precision="fp32", device="cpu", require_pretrained=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise ValueError(f"the weights in {folder} must be those of its open_clip_config.json: {reason}") from error
    model = model.to(device).eval()
    tokenizer = open_clip.get_tokenizer(name)
    size = model.visual.image_size
    preprocess = open_clip.get_model_preprocess_cfg(model)

    def encode_text(captions: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(captions)).to(device))

    return Clip(
        encode_image=model.encode_image,
        encode_text=encode_text,
        size=size if isinstance(size, int) else size[0],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        digest=digest,
        device=device,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got something else: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
