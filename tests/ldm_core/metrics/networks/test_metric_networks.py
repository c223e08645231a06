"""The metrics' networks, with random weights in the published layouts, against the libraries of published code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm_core.images import to_unit_range
from ldm_core.metrics.networks.clip import load_clip
from ldm_core.metrics.networks.inception import Inception
from ldm_core.metrics.networks.lpips import Lpips
from ldm_core.metrics.networks.weights import MetricUnavailableError
from ldm_core.metrics.preprocessing import crop_for_clip, quantize, resize_for_inception


def images(count: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def as_pil(levels: Tensor) -> Image.Image:
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def test_images_are_rounded_to_the_pixels_of_their_png_and_come_back() -> None:
    x = torch.tensor([-1.0, -0.999, 0.0, 0.5, 1.0, 1.003]).expand(1, 3, 1, 6)
    assert quantize(x)[0, 0, 0].tolist() == [0, 0, 128, 191, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(quantize(to_unit_range(levels)), levels)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\) torch.float32"),
        (torch.zeros(1, 1, 8, 8), r"got \(1, 1, 8, 8\) torch.float32"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "got .* torch.uint8"),
        (torch.full((1, 3, 8, 8), 255.0), r"finite and in \[-1, 1\], got 255 to 255: scale pixels, clamp samples"),
        (torch.full((1, 3, 8, 8), torch.nan), r"finite and in \[-1, 1\], got nan to nan"),
    ],
)
def test_what_is_not_an_image_from_minus_one_to_one_is_refused(wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(wrong)


@pytest.mark.parametrize("size", [(40, 56), (400, 320)])
def test_clean_resizing_is_pils_unrounded_bicubic(size: tuple[int, int]) -> None:
    levels = quantize(images(1, *size))
    resized = resize_for_inception(levels, 299, "clean")[0]
    for channel in range(3):
        picture = Image.fromarray(levels[0, channel].numpy().astype(np.float32))
        expected = np.asarray(picture.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_allclose(resized[channel].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("size", [(40, 56), (100, 90)])
def test_the_crop_for_clip_is_pils_to_one_level(size: tuple[int, int]) -> None:
    levels = quantize(images(1, *size))
    side = min(size)
    left, top = (size[1] - side) // 2, (size[0] - side) // 2
    square = as_pil(levels[0]).crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    found = crop_for_clip(levels, 32)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.999


def test_inception_is_torch_fidelitys_network_by_path(inception_weights: Path, tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    x = images(2, 40, 56)
    state = torch.get_rng_state()
    network = Inception(inception_weights, resize="tensorflow")
    assert torch.equal(torch.get_rng_state(), state)
    published = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_weights))
    features, logits = published(quantize(x))
    found = network(x)
    assert found.features.shape == (2, 2048)
    assert found.logits.shape == (2, 1008)
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    # Resizing otherwise gives another metric; the same weights in another container give the same network.
    save_file(torch.load(inception_weights, weights_only=True), tmp_path / "inception.safetensors")
    clean = Inception(tmp_path / "inception.safetensors", resize="clean")
    assert clean.digest != network.digest
    assert not torch.allclose(clean(x).features, features, rtol=1e-2)
    enlarged = Inception(inception_weights, resize="clean")(x)
    assert torch.equal(clean(x).features, enlarged.features)


class Intruder:
    """Creates a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, (str(self.path), "w")  # type: ignore[return-value]


def test_files_that_are_not_weights_are_refused_and_never_run(inception_weights: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": Intruder(tmp_path / "proof")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth must hold the named tensors of the FID Inception-v3"):
        Inception(tmp_path / "evil.pth")
    assert not (tmp_path / "proof").exists()
    (tmp_path / "noise.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match=r"noise.safetensors must hold the named tensors"):
        Inception(tmp_path / "noise.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"must hold only the named tensors .* got list"):
        Inception(tmp_path / "list.pth")
    tensors = torch.load(inception_weights, weights_only=True)
    del tensors["Mixed_5b.branch1x1.conv.weight"]
    torch.save(tensors, tmp_path / "partial.pth")
    with pytest.raises(
        ValueError, match=r"partial.pth must hold the FID Inception-v3 .*Mixed_5b.branch1x1.conv.weight"
    ):
        Inception(tmp_path / "partial.pth")
    with pytest.raises(ValueError, match="must be 'clean' or 'tensorflow', got 'nearest'"):
        Inception(inception_weights, resize="nearest")  # type: ignore[arg-type]
    with pytest.raises(MetricUnavailableError, match=r"no file .*absent.pth"):
        Inception(tmp_path / "absent.pth")


def test_clip_of_transformers_embeds_as_its_own_pipeline_does(clip_folder: Path) -> None:
    from transformers import CLIPModel

    x, captions = images(3, 32, 32), ["a cat", "the dog runs", "a very long caption that the model must cut"]
    clip = load_clip(clip_folder)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    pixels = (quantize(x) / 255 - mean) / std
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(clip(x), expected, rtol=1e-4, atol=1e-6)
    text = clip.text(captions)
    assert text.shape == (3, 12)
    # Padding to the model's length changes no caption's embedding.
    torch.testing.assert_close(clip.text(captions[:1]), text[:1], rtol=1e-4, atol=1e-6)
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    ids = [[52, letters["a"] + 26, letters["c"], letters["a"], letters["t"] + 26, 53]]
    with torch.no_grad():
        expected = model.text_projection(model.text_model(input_ids=torch.tensor(ids)).pooler_output)
    torch.testing.assert_close(text[:1], expected, rtol=1e-4, atol=1e-6)


def test_clip_of_open_clip_embeds_as_its_own_pipeline_does(open_clip_folder: Path) -> None:
    import open_clip

    x, captions = images(3, 48, 48), ["a cat", "the dog runs", "a bird"]
    clip = load_clip(open_clip_folder)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{open_clip_folder}")
    model.eval()
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(as_pil(levels)) for levels in quantize(x)]))
        text = model.encode_text(open_clip.tokenize(captions, context_length=16))
    torch.testing.assert_close(clip(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(clip.text(captions), text, rtol=1e-4, atol=1e-6)


def test_clip_folders_that_cannot_be_used_are_refused_by_what_is_wrong(
    clip_folder: Path, open_clip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(MetricUnavailableError, match="is not a CLIP folder"):
        load_clip(tmp_path)
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_clip(tmp_path).digest == load_clip(clip_folder).digest
    # The normalisation of pixels changes the embeddings as the weights do, so it belongs to the digest.
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert load_clip(tmp_path).digest != load_clip(clip_folder).digest
    config = json.loads((tmp_path / "config.json").read_text())
    deeper = config | {"vision_config": config["vision_config"] | {"num_hidden_layers": 3}}
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(ValueError, match=r"weights in .* must be whole, without .*layers.2"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ValueError, match="must be of model_type 'clip', got 'bert'"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must hold JSON"):
        load_clip(tmp_path)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "open_clip_model.safetensors").write_bytes((open_clip_folder / "open_clip_model.safetensors").read_bytes())
    whole = json.loads((open_clip_folder / "open_clip_config.json").read_text())
    whole["model_cfg"]["vision_cfg"]["width"] = 32
    (hub / "open_clip_config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"weights in .* must be those of its open_clip_config.json: .*"):
        load_clip(hub)
    whole["model_cfg"]["text_cfg"]["hf_model_name"] = "roberta-base"
    (hub / "open_clip_config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="must hold CLIP's own text tower, got one by hub name"):
        load_clip(hub)


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_is_torchmetrics_lpips_over_the_same_backbone(network: str, tmp_path: Path) -> None:
    from torchmetrics.functional.image.lpips import _LPIPS

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        published = _LPIPS(net=network, pnet_rand=True)
    backbone = {f"features.{name.partition('.')[2]}": tensor for name, tensor in published.net.state_dict().items()}
    torch.save(backbone, tmp_path / "backbone.pth")
    lpips = Lpips(tmp_path / "backbone.pth")
    assert lpips.network == network
    x, y = images(2, 40, 48, seed=0), images(2, 40, 48, seed=1)
    torch.testing.assert_close(lpips(x, y), published(x, y).flatten(), rtol=1e-4, atol=1e-7)
    assert lpips(x, x).tolist() == [0.0, 0.0]


def test_lpips_can_be_trained_on(alexnet_weights: Path) -> None:
    lpips = Lpips(alexnet_weights)
    x, y = torch.zeros(1, 3, 32, 32, requires_grad=True), images(1, 32, 32)
    lpips(x, y).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    # If no feature is active, the distance is zero, and so is the gradient (not 0 / 0).
    for bias in (parameter for name, parameter in lpips.layers.named_parameters() if name.endswith("bias")):
        bias.fill_(-1e6)
    x.grad = None
    dead = lpips(x, y)
    dead.sum().backward()
    assert dead.tolist() == [0.0]
    assert not x.grad.any()


def test_lpips_refuses_other_networks_and_images_it_cannot_compare(alexnet_weights: Path, tmp_path: Path) -> None:
    tensors = torch.load(alexnet_weights, weights_only=True)
    lpips = Lpips(alexnet_weights)
    with pytest.raises(ValueError, match=r"by alex needs images of at least 31 pixels a side, got \(30, 64\)"):
        lpips(images(1, 30, 64), images(1, 30, 64))
    assert lpips(images(1, 31, 31), images(1, 31, 31, seed=1)).isfinite().all()
    with pytest.raises(ValueError, match=r"compares images \(B, 3, H, W\), got \(1, 3, 32, 32\) and \(1, 3, 32, 33\)"):
        lpips(images(1, 32, 32), images(1, 32, 33))
    tensors["features.3.weight"] = tensors["features.3.weight"][:5]
    torch.save(tensors, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"VGG-16 or AlexNet .* got another features.3.weight"):
        Lpips(tmp_path / "cut.pth")
    torch.save({"head": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"got features.0.weight of shape \(0,\)"):
        Lpips(tmp_path / "other.pth")
