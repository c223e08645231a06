"""The examples of docs/api.md run, each headline from the start, as a reader would type them."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs/api.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))


@pytest.mark.parametrize("title", SECTIONS)
def test_the_examples_of_the_api_page_run(title: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", SECTIONS[title], flags=re.M | re.S)
    assert blocks, f"{title} shows no code"
    with torch.enable_grad():  # and as it was before, whatever the example does
        exec(compile("\n".join(blocks), f"docs/api.md, {title}", "exec"), {})
