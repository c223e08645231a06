"""The benchmark of the pairs stage counts what it says, and whole deliveries only. Speed is asserted nowhere."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from jobs.recipes import recipe_path
from pipelines.run.recipe import load_recipe
from tests.benchmarks import bench_pairs, codec_loop, img2dataset_peer, pairs_command, photographs, tool_run
from tests.benchmarks.codec_loop import CodecRun
from tests.benchmarks.pairs_server import Figures, RunningServer, serving
from tests.benchmarks.process_tree import TreeUse, measure
from tests.benchmarks.scaled_decoding import psnr_db

# Idle at the end, so that its clock is read once more: nobody else tells of a process that nobody waits for.
BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\ntime.sleep(2)\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    noise = cv2.resize(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8), (640, 480))
    (folder / "originals").mkdir()
    cv2.imwrite(str(folder / "originals" / "one.jpg"), noise)
    return photographs.make_photographs(folder / "made", folder / "originals", 2)


@pytest.fixture
def server(files: list[Path]) -> Iterator[RunningServer]:
    with serving(files[0].parent) as running:
        yield running


def test_photographs_are_made_once_and_are_those_of_their_number(files: list[Path]) -> None:
    pictures = [Image.open(path) for path in files]
    assert [picture.size for picture in pictures] == [(1152, 864)] * 2
    assert files[0].read_bytes() != files[1].read_bytes()
    assert photographs.make_photographs(files[0].parent, None, 2) == files  # the cache, and no rendering
    assert np.asarray(pictures[0]).std() > 10


def test_pictures_can_be_rendered_where_there_is_no_photograph(tmp_path: Path) -> None:
    (path,) = photographs.make_photographs(tmp_path / "made", None, 1)
    assert Image.open(path).size == (1152, 864)
    assert 100_000 < path.stat().st_size < 500_000


def test_every_url_is_a_picture_with_bytes_of_its_own(server: RunningServer, files: list[Path]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)  # kept alive over all requests
    answers = []
    for number in (0, 1, 2):
        connection.request("GET", f"/{number}.jpg")
        answers.append(connection.getresponse().read())
    pixels = [np.asarray(Image.open(io.BytesIO(answer))) for answer in answers]
    assert len({hashlib.sha256(answer).digest() for answer in answers}) == 3
    assert (pixels[2] == pixels[0]).all()
    assert (pixels[0] == np.asarray(Image.open(files[0]))).all()
    figures = server.take_figures()
    assert (figures.requests, figures.connections) == (3, 2)
    assert figures.bytes > sum(map(len, answers))
    assert server.take_figures().requests == 0


def test_latency_delays_every_answer_but_not_one_after_the_other(files: list[Path]) -> None:
    with serving(files[0].parent, latency_s=0.5) as server:
        connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(20)]
        start = time.monotonic()
        for number, connection in enumerate(connections):
            connection.request("GET", f"/{number}.jpg", headers={"Connection": "close"})
        for connection in connections:
            connection.getresponse().read()
        # One after the other they would take 10 s.
        assert 0.5 <= time.monotonic() - start < 10


def test_daemons_and_children_nobody_waits_for_are_counted(tmp_path: Path) -> None:
    burn = [sys.executable, "-S", "-c", BURN.format(0.5)]
    code = f"""
import os, signal, subprocess, sys, time
subprocess.run({burn!r})
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, {burn!r})
    os._exit(0)
os.wait()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
child = subprocess.Popen({burn!r})
while os.path.exists(f"/proc/{{child.pid}}"): time.sleep(0.05)
sys.exit(3)
"""
    use = measure([sys.executable, "-S", "-c", code], log=tmp_path / "log")
    assert use.code == 3
    assert use.cpu_s > 1.4
    assert use.cpu_s_until(use.started) == 0
    assert 0 < use.cpu_s_until(use.started + 0.4) < use.cpu_s_until(use.ended + 99) == use.cpu_s


def test_a_tool_that_leaves_pictures_out_is_not_counted(server: RunningServer, tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg")
    code = """
import sys, tarfile, urllib.request
urllib.request.urlopen(sys.argv[1]).read()
with tarfile.open(sys.argv[2] + "/0.tar", "w") as tar:
    for key in range(2): tar.add(sys.argv[3], f"{key}.jpg")
"""
    output = tmp_path / "output"
    output.mkdir()
    command = [sys.executable, "-c", code, server.url(0), str(output), str(tmp_path / "a.jpg")]
    run = tool_run.run_tool(command, output, server, rows=2, size=(4, 3), env=dict(os.environ))
    # A file's time is only as fine as the kernel's tick.
    assert run.tree.started < run.server.first_request < run.finished + 0.1 < run.tree.ended + 0.2  # type: ignore[operator]
    assert run.figures()["images"] == 2
    with pytest.raises(SystemExit, match=r"delivered 2 of 3 pictures of \(4, 3\)"):
        tool_run.run_tool(command, output, server, rows=3, size=(4, 3), env=dict(os.environ))
    with pytest.raises(SystemExit, match="delivered 0 of 2"):
        tool_run.run_tool(command, output, server, rows=2, size=(3, 4), env=dict(os.environ))
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with pytest.raises(SystemExit, match="ended with 7"):
        tool_run.run_tool(command, output, server, rows=2, size=(4, 3), env=dict(os.environ))


def test_ratios_are_medians_over_rounds_of_images_per_cpu_second() -> None:
    def run(cpu_s: float) -> tool_run.ToolRun:
        # A second before the first request, in which half of the CPU time goes; then until the end, at 3 s.
        tree = TreeUse(0, 10.0, 13.0, cpu_s, [(10.0, 0.0), (11.0, cpu_s / 2), (13.0, cpu_s)])
        return tool_run.ToolRun(100, tree, Figures(requests=100, first_request=11.0), finished=13.0)

    ours, theirs = [run(4.0), run(99.0), run(4.0)], [run(12.0)] * 3
    codec, same_work = [CodecRun(100, 1.0, 1.0)] * 3, [CodecRun(100, 1.5, 1.0)] * 3
    found = bench_pairs.ratios(ours, theirs, codec, same_work)
    assert found["vs_img2dataset_cpu"] == 3
    assert found["vs_img2dataset_wall"] == 1
    assert found["vs_codec"] == 0.5
    assert found["vs_codec_same_work"] == 0.75
    assert bench_pairs.ratios(ours, [], codec, same_work)["vs_img2dataset_cpu"] is None


def test_our_settings_are_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path("small"), pairs_command.overrides(tmp_path / "urls.parquet", 256, 512))
    assert recipe.pairs.download.connections == 512
    assert recipe.pairs.deduplicate


def test_the_codec_runs_in_two_processes(files: list[Path]) -> None:
    run = codec_loop.run_codec(files, 4, 256, antialias=False)
    assert run.images == 4
    assert run.cpu_s > 0


def test_img2dataset_delivers_what_we_ask_of_it(server: RunningServer, tmp_path: Path) -> None:
    peer = img2dataset_peer.environment(Path(tempfile.gettempdir()) / "bench-pairs", install=False)
    if peer is None:
        pytest.skip("img2dataset is installed by the first `make bench-pairs`")
    urls = tool_run.write_urls(tmp_path / "urls.parquet", server, 4)
    run = img2dataset_peer.run_peer(peer, urls, tmp_path / "out", server, rows=4, size=(341, 256), threads=4)
    assert run.server.requests == 4


def test_psnr_of_a_known_error() -> None:
    flat = np.full((8, 8, 3), 100, np.uint8)
    assert psnr_db(flat, flat) == 99
    assert psnr_db(flat, flat + 1) == pytest.approx(48.13, abs=0.01)


def test_the_last_line_is_json(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals = files[0].parent.parent / "originals"
    bench_pairs.main(
        ["--only", "psnr", "--distinct", "2", "--photographs", str(originals), "--scratch", str(tmp_path / "scratch")]
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    served = result["psnr"]["served"]
    assert served["smallest"]["photographs"] == 2
    assert served["next"]["median_db"] >= served["smallest"]["median_db"] > 30
    assert result["pictures"]["distinct"] == 2
