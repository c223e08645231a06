"""The demo's data: the same bytes from the same arguments, hostile rows between good ones, and nothing done twice."""

import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from jobs.demo import encodings
from jobs.demo.dataset import HOSTILE, DemoData, prepare, table_rows
from jobs.demo.scenes import Scene, held_out_combinations
from pipelines.errors import UserError
from pipelines.stages.evaluate.shapes.detector import detect

PICTURES = 120


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def data(root: Path) -> DemoData:
    return prepare(root, pictures=PICTURES, seed=3)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_table_has_laions_columns_and_a_row_per_picture_and_per_trouble(data: DemoData) -> None:
    table = pq.read_table(data.table)
    columns = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "hash", "NSFW"]
    assert table.column_names == columns
    assert data.counts == {"picture": PICTURES, **{kind.name: 1 for kind in HOSTILE}}
    assert table.num_rows == sum(data.counts.values())
    assert all(
        url.startswith(("http://pictures.demo.ldm/", "http://slow.demo.ldm/")) for url in table["URL"].to_pylist()
    )


def test_a_full_demo_has_about_one_and_a_half_percent_of_hostile_rows_spread_over_the_table() -> None:
    rows = table_rows(4000, seed=0)
    hostile = [row.index for row in rows if row.kind.name != "picture"]
    assert len(hostile) == 60
    assert len(rows) == 4060
    assert set(np.diff(hostile)) <= {67, 68}


def test_good_rows_point_at_pictures_that_show_what_the_caption_says(data: DemoData) -> None:
    captions = dict(zip(*(pq.read_table(data.table)[name].to_pylist() for name in ("URL", "TEXT")), strict=True))
    for row in table_rows(PICTURES, seed=3)[::3]:
        if row.kind.name == "picture":
            path = data.web / "images" / row.file_name
            seen = detect(np.asarray(Image.open(path)))
            assert seen.colour in captions[row.url]
            assert seen.shape in captions[row.url]


def test_duplicates_point_at_the_bytes_of_the_picture_before(data: DemoData) -> None:
    rows = table_rows(PICTURES, seed=3)
    (duplicate,) = [row for row in rows if row.kind.name == "duplicate"]
    before = rows[duplicate.index - 1]
    assert before.kind.name == "picture"
    assert duplicate.url == before.url.replace("/images/", "/copies/")


def test_prompts_are_the_held_out_scenes(data: DemoData) -> None:
    prompts = [json.loads(line) for line in data.prompts.read_text(encoding="utf-8").splitlines()]
    assert [list(row) for row in prompts[:1]] == [["prompt", "colour", "shape", "size", "position", "novel_pair"]]
    held_out = held_out_combinations(3)
    assert [
        (Scene(*[row[k] for k in ("colour", "shape", "size", "position")]), row["novel_pair"]) for row in prompts
    ] == [(item.scene, item.novel_pair) for item in held_out]


def test_a_second_call_does_nothing_and_another_seed_does(data: DemoData, root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.web.rglob("*")}
    again = prepare(root, pictures=PICTURES, seed=3)
    assert (again.rendered, again.table, again.counts) == (False, data.table, data.counts)
    assert before == {path: path.stat().st_mtime_ns for path in data.web.rglob("*")}


def test_other_arguments_or_a_missing_picture_render_anew(tmp_path: Path) -> None:
    assert prepare(tmp_path, pictures=50).rendered
    assert prepare(tmp_path, pictures=50, seed=1).rendered
    (tmp_path / "web/images/000001.jpg").unlink()
    assert prepare(tmp_path, pictures=50, seed=1).rendered
    assert not prepare(tmp_path, pictures=50, seed=1).rendered


def test_killed_halfway_and_run_again_the_bytes_are_those_of_an_uninterrupted_run(
    data: DemoData, tmp_path: Path
) -> None:
    program = (
        f"import pathlib, jobs.demo.dataset as d; d.prepare(pathlib.Path({str(tmp_path)!r}), pictures=3000, seed=3)"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    images = tmp_path / "web" / "images"
    while not images.is_dir() or sum(1 for _ in images.iterdir()) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "web" / "complete.json").exists()
    torn = images / "000003.jpg"
    torn.write_bytes(torn.read_bytes()[:100])

    assert prepare(tmp_path, pictures=PICTURES, seed=3).rendered
    ours, theirs = digests(tmp_path / "web"), digests(data.web)
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize("kind", ["cmyk", "palette", "exif_rotated", "rgba", "deep"])
def test_odd_formats_really_are_odd_and_hold_the_scene(kind: str) -> None:
    scene = Scene("orange", "triangle", "large", "left")
    content = getattr(encodings, kind)(scene, 11)
    image = Image.open(io.BytesIO(content))
    facts = {
        "cmyk": image.mode == "CMYK",
        "palette": image.mode == "P",
        "exif_rotated": image.getexif().get(encodings.ORIENTATION_TAG) == 6,
        "rgba": image.mode == "RGBA" and image.getpixel((127, 127))[3] == 0,  # type: ignore[index]
        "deep": content[24] == 16,
    }
    assert facts[kind]
    upright = ImageOps.exif_transpose(image).convert("RGBA")
    page = Image.new("RGBA", upright.size, "white")
    seen = detect(np.asarray(Image.alpha_composite(page, upright).convert("RGB")))
    assert (seen.colour, seen.shape, seen.position) == ("orange", "triangle", "left")


def test_a_tiny_picture_is_8_pixels_a_side() -> None:
    assert Image.open(io.BytesIO(encodings.tiny(Scene("red", "ring", "small", "top"), 1))).size == (8, 8)


def test_too_few_pictures_and_a_root_that_is_a_file_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 50 pictures; got 10"):
        prepare(tmp_path, pictures=10)
    (tmp_path / "file").write_text("here already")
    with pytest.raises(UserError, match=r"must be a folder; .* is a file; choose another --root"):
        prepare(tmp_path / "file", pictures=50)


def test_the_demos_data_need_no_torch() -> None:
    program = "import sys, jobs.demo.dataset, jobs.demo.web; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
