"""The examples of docs/api.md run, each headline from the start, as a reader would type them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm_core import checkpoint, presets
from ldm_core.checkpoint_formats import compvis
from ldm_core.tokenizers.clip import CLIP_END, CLIP_START, clip_tokenizer
from tests.tiny_artifacts import encoded_latents_artifact, first_stage_artifact, pairs_artifact

PAGE = (Path(__file__).parents[1] / "docs/api.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The working folder of a reader who has finished the run, and downloaded the checkpoint, that the page names."""
    folder, before = tmp_path_factory.mktemp("reader"), Path.cwd()
    root, key = folder / "runs/demo", "0123456789abcdef"
    encoded_latents_artifact(root, pairs_artifact(root, name=key), first_stage_artifact(root), name=key)
    stand_in = presets.get("tiny-sd").build()
    torch.save({"state_dict": compvis.export_state(stand_in)}, folder / "v1-5-pruned.ckpt")
    tokens = [*sorted({letter + end for letter in "aredsqu" for end in ("", "</w>")}), CLIP_START, CLIP_END]
    checkpoint.write_tokenizer(clip_tokenizer({token: i for i, token in enumerate(tokens)}, []), folder)
    os.chdir(folder)
    yield
    os.chdir(before)


@pytest.mark.parametrize("title", SECTIONS)
def test_the_examples_of_the_api_page_run(title: str, finished_run: None) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", SECTIONS[title], flags=re.M | re.S)
    assert blocks, f"{title} shows no code"
    with torch.enable_grad():  # and as it was before, whatever the example does
        exec(compile("\n".join(blocks), f"docs/api.md, {title}", "exec"), {})
