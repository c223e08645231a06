"""The report of made-up artifacts, read back as a browser would parse it."""

import base64
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipelines.charts import Axis, histogram, loss_chart, running_mean
from pipelines.formatting import format_bytes, format_seconds
from pipelines.grids import encode_png, grid
from pipelines.ledger import Artifact, ArtifactWriter
from pipelines.report import build_report, wilson_interval
from pipelines.run import StageRow
from pipelines.storage import Storage
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
    """A grid of coloured discs, the more noise the less of them."""
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
    assert not [attributes for _, attributes in page.tags if "href" in attributes]


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


def polyline(svg: str, style: str) -> list[tuple[float, float]]:
    tree = ElementTree.fromstring(svg)
    points = next(e.attrib["points"] for e in tree.iter("polyline") if e.attrib["class"] == style)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def test_a_loss_chart_falls_where_the_loss_falls_and_skips_what_is_not_finite() -> None:
    values = [1 / (step + 1) for step in range(100)]
    values[50] = float("nan")
    line = polyline(loss_chart(range(100), values), "raw")
    assert len(line) == 99
    assert all(after[1] > before[1] for before, after in itertools.pairwise(line)), "larger y is lower on the page"


def test_a_long_loss_curve_is_thinned_and_keeps_its_ends() -> None:
    line = polyline(loss_chart(range(100_000), [1.0 + step for step in range(100_000)]), "raw")
    assert len(line) <= 502
    assert line[-1][0] > 860


def test_only_losses_that_span_enough_get_a_logarithmic_axis() -> None:
    assert "log scale" in loss_chart([0, 1], [1.0, 0.1])
    assert "log scale" not in loss_chart([0, 1], [1.0, 0.9])
    assert "log scale" not in loss_chart([0, 1], [1.0, -0.1])


@pytest.mark.parametrize("values", [[], [1.0], [float("nan")] * 5])
def test_too_few_losses_give_no_chart(values: list[float]) -> None:
    assert loss_chart(range(len(values)), values) == ""


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0], [-1.0, 2.0], [1e-12, 1e12]])
def test_odd_losses_still_give_a_chart(values: list[float]) -> None:
    svg = loss_chart([0, 1], values)
    _, _, width, height = map(float, ElementTree.fromstring(svg).attrib["viewBox"].split())
    (x0, y0), (x1, y1) = polyline(svg, "raw")
    assert 0 < x0 < x1 < width
    assert 0 < y1 <= y0 < height, "larger losses are higher up, which is a smaller y"
    assert (y1 < y0) == (values[1] > values[0])


def test_a_histogram_has_a_bar_for_each_bin_between_the_filled_ends() -> None:
    svg = ElementTree.fromstring(histogram([0, 1, 2, 3, 4], [0, 2, 0, 5, 0], "words"))
    bars = list(svg.iter("rect"))
    assert [bar.find("title").text for bar in bars] == ["1 to 2: 2", "2 to 3: 0", "3 to 4: 5"]  # type: ignore[union-attr]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights == pytest.approx([heights[2] * 2 / 5, 0, heights[2]], abs=0.1)
    assert histogram([0, 1], [0, 0], "words") == ""


def test_axis_ticks_are_round_and_inside() -> None:
    assert Axis(0, 970, 0, 1).ticks() == [0, 200, 400, 600, 800]
    assert Axis(0.03, 1.2, 0, 1, log=True).ticks() == pytest.approx([0.05, 0.1, 0.2, 0.5, 1])
    assert Axis(1, 100, 0, 200, log=True).place(10) == pytest.approx(100)


def test_a_running_mean_keeps_the_ends_and_does_not_lag() -> None:
    assert running_mean([4, 0, 2, 1, 1], reach=1) == [4, 2, 1, 4 / 3, 1]
    assert running_mean(range(50), reach=7) == pytest.approx(list(range(50)))


def test_the_interval_is_wilsons() -> None:
    assert wilson_interval(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-3)
    assert wilson_interval(1.0, 64)[1] == 1.0
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_sizes_and_times_read_well() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [format_seconds(s) for s in (0.4, 61, 7384)] == ["0.4 s", "1 min 01 s", "2 h 03 min"]
