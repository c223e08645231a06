"""The report of made-up artifacts, read back as a browser would parse it."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.drawing.grids import encode_png, grid
from pipelines.run.report import build_report
from pipelines.run.results import StageRow
from pipelines.stages.evaluate.section import wilson_interval
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.tiny_artifacts import pairs_artifact

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quotes" \'; {{ 7*7 }}'
SCORES = {
    "samples": 96,
    "attributes": {"colour": 0.97, "shape": 0.86},
    "groups": {"novel_pair": {"true": {"accuracy": 0.8, "samples": 48}}},
    "items": [{"prompt": "a <i>red</i> star", "right": False, "colour": "red", "shape": None}],
}
RECIPE = "name: shapes\nseed: 7\npairs:\n  source: http://pictures.example/<b>\n"


def finish(root: Storage, stage: str, details: dict[str, Any], files: dict[str, bytes]) -> Artifact:
    storage = root / stage / "0123456789abcdef"
    writer = ArtifactWriter(stage, "0123456789abcdef", storage)
    for name, data in files.items():
        storage.write_bytes(name, data)
        writer.commit(name, rows=10 if name.endswith(".tar") else 0)
    writer.commit_once("notes.txt", lambda path: path.write_text("of any artifact"))
    writer.finish(
        format_version=1,
        config={},
        identity={},
        upstream={},
        details=details,
        seconds=12.5,
        code_version="0.1.0",
    )
    return Artifact(stage, "0123456789abcdef", storage)


def picture(count: int, captions: list[str] | None = None, noise: float = 0.0) -> bytes:
    """Draw a grid of coloured discs: the more noise, the fainter."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    images = []
    for _ in range(count):
        disc = (x**2 + y**2 < random.uniform(0.2, 0.7))[..., None]
        clean = np.where(disc, random.integers(0, 255, 3), random.integers(180, 255, 3))
        images.append((1 - noise) * clean + noise * random.uniform(0, 255, clean.shape))
    return encode_png(grid(np.stack(images).astype(np.uint8), 8, captions, scale=2))


def losses(steps: int) -> bytes:
    random = np.random.default_rng(0)
    values = [
        {"step": 10 * i, "loss": float(0.05 + np.exp(-i / 40) * random.uniform(0.7, 1.3)), "lr": 1e-4}
        for i in range(steps)
    ]
    return json.dumps(values).encode()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = Storage(str(tmp_path_factory.mktemp("run")))
    captions = [f"a small red circle on a blue field, number {i}" for i in range(16)]
    shard = Path(pairs_artifact(tmp_path_factory.mktemp("pairs")).storage.path("000000.tar")).read_bytes()
    return {
        "pairs": finish(
            root,
            "pairs",
            {
                "samples": 2841,
                "input_rows": 3000,
                "statuses": {"ok": 2841, "http_404": 60, "decode_error": 45, "duplicate": 30, "too_small": 24},
                "caption_words": {"edges": [0, 2, 4, 6, 8, 10, 12], "counts": [0, 120, 900, 1300, 450, 71, 0]},
                "aspect": {"edges": [0.5, 0.8, 1.0, 1.25, 1.6], "counts": [100, 741, 1800, 150, 50]},
                "examples": [
                    {"key": "000000000", "caption": HOSTILE},
                    {"key": "000000001", "caption": "ein Kätzchen 猫"},
                ],
                "failures": {
                    "http_404": {"key": "000000007", "caption": "gone\x1b[2J\u202e", "url": "javascript:alert(1)"}
                },
                "hosts": [{"host": "<b>.example", "rows": 1234, "ok": 0.625, "failure": "http_404"}],
                "hosts_exact": False,
                "buckets": {"320x192": 700, "256x256": 2141},
                "bytes": 2841 * 7168,
                "bytes_per_sample": 7168,
            },
            {"000000.tar": shard},
        ),
        "autoencoder": finish(
            root,
            "autoencoder",
            {
                "psnr_db": 28.31,
                "steps": 2000,
                "parameters": 1_234_567,
                "encoder_sha256": "ab" * 32,
                "images_per_s": 190.0,
            },
            {"history.json": losses(200), "reconstructions.png": picture(16)},
        ),
        "latents": finish(
            root,
            "latents",
            {"samples": 2841, "latent_shape": [4, 8, 8], "latent_dtype": "float16", "scale_factor": 0.1823},
            {"000000.tar": b"x" * 9000},
        ),
        "diffusion": finish(
            root,
            "diffusion",
            {
                "steps": 4000,
                "parameters": {"unet": 9_000_000, "text": 2_000_000},
                "images_per_s": 411.2,
                "final_loss": 0.052,
            },
            {
                "history.json": losses(400),
                **{f"previews/step_{s:08d}.png": picture(8, noise=1 - s / 4000) for s in range(400, 4001, 400)},
            },
        ),
        "evaluate": finish(
            root,
            "evaluate",
            {"alignment_accuracy": 0.84375, "alignment_samples": 96, "prompts": [HOSTILE, *captions]},
            {
                "grid.png": picture(16, captions),
                "training_grid.png": picture(16),
                "scores.json": json.dumps({"alignment": SCORES}).encode(),
            },
        ),
        "export": finish(root, "export", {"layouts": ["ldm", "diffusers"]}, {"model.safetensors": b"x" * 70000}),
    }


def rows(artifacts: dict[str, Artifact]) -> list[StageRow]:
    states = {"pairs": "cached", "autoencoder": "resumed"}
    return [
        StageRow(name, states.get(name, "run"), artifact.key, artifact.manifest.rows, artifact.manifest.bytes, 10.0 * i)  # type: ignore[arg-type]
        for i, (name, artifact) in enumerate(artifacts.items())
    ]


class Page(HTMLParser):
    """Tags, their attributes and the text of a page; refuses tags that do not nest."""

    VOID = frozenset({"meta", "img", "br", "hr", "input", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def html(artifacts: dict[str, Artifact]) -> str:
    return build_report(Storage("run"), RECIPE, rows(artifacts), artifacts)


def test_the_report_holds_what_happened(html: str) -> None:
    text = " ".join(" ".join(Page(html).texts).split())
    for fact in (
        "shapes",
        "84.4 %",
        "of 96 held-out prompts; 95 % interval 76–90 %",
        "2,841",
        "411.2",
        "28.3 dB",
        "http_404 60 2.0 %",
        "4 × 8 × 8",
        "step 4,000",
        "colour 97.0 %",
        "novel pair: yes 80.0 %",
        "ein Kätzchen 猫",
        "seed: 7",
        "model.safetensors 68.4 KiB",
        "Size of one 7.0 KiB",
        "Rows (about)",
        "<b>.example 1,234 62.5 % http_404",
        "256x256 2,141 75.4 %",
    ):
        assert fact in text, fact


def test_the_report_needs_no_other_file_and_runs_nothing(html: str) -> None:
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base")]
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) >= 6
    for source in pictures:
        kind, data = source.split(";base64,")
        assert kind in ("data:image/png", "data:image/webp")
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    links = [attributes["href"] or "" for _, attributes in page.tags if "href" in attributes]
    assert all(link.startswith("#") for link in links), "within the page, as from a tick to its mark"


def test_hostile_captions_are_shown_as_text(html: str) -> None:
    page = Page(html)
    text = "".join(page.texts)
    assert HOSTILE in text
    assert "a <i>red</i> star" in text
    assert "http://pictures.example/<b>" in text
    assert "<script" not in html
    assert "gone\ufffd[2J\ufffd" in text


def test_random_samples_are_shown(html: str) -> None:
    sheets = [dict(attributes) for tag, attributes in Page(html).tags if tag == "img"]
    source = next(sheet["src"] or "" for sheet in sheets if sheet["alt"] == "Pictures with their captions")
    image = Image.open(io.BytesIO(base64.b64decode(source.split(";base64,")[1])))
    assert image.width == 5 * 180 + 4, "five samples side by side"


def test_at_most_eight_previews_are_shown_and_the_last_is_one(html: str) -> None:
    steps = [int(s.replace(",", "")) for s in re.findall(r"<figcaption>step ([\d,]+)<", html)]
    assert steps == [800, 1600, 2400, 3200, 4000]


@pytest.mark.parametrize("missing", ["pairs", "autoencoder", "latents", "diffusion", "evaluate", "export"])
def test_a_stage_that_did_not_run_is_left_out(artifacts: dict[str, Artifact], html: str, missing: str) -> None:
    title = {"pairs": "Image–text pairs", "evaluate": "Evaluation"}.get(missing, missing.capitalize())
    assert f"<h2>{title}</h2>" in html
    others = {name: artifact for name, artifact in artifacts.items() if name != missing}
    assert f"<h2>{title}</h2>" not in build_report(Storage("run"), RECIPE, rows(others), others)


def test_a_run_without_artifacts_still_has_a_page(tmp_path: Path) -> None:
    assert "<h1>run</h1>" in build_report(Storage(str(tmp_path)), "", [], {})


def test_artifacts_without_details_do_not_break_the_page(tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    names = ("pairs", "autoencoder", "latents", "diffusion", "evaluate", "export")
    bare = {name: finish(root, name, {}, {}) for name in names}
    page = Page(build_report(root, RECIPE, rows(bare), bare))
    text = " ".join(" ".join(page.texts).split())
    for title in ("Image–text pairs", "Autoencoder", "Latents", "Diffusion", "Evaluation", "Export"):
        assert title in page.texts, title
    assert not re.search(r"\b(None|nan|undefined)\b", text)


def test_large_pictures_become_webp(tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    artifact = finish(root, "evaluate", {}, {"grid.png": encode_png(noise)})
    html = build_report(root, RECIPE, [], {"evaluate": artifact})
    assert "data:image/webp" in html
    assert "data:image/png" not in html


def test_the_interval_is_wilsons() -> None:
    assert wilson_interval(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-3)
    assert wilson_interval(1.0, 64)[1] == 1.0
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
