"""The demo's web over real sockets: what it serves, how it misbehaves, and that it never outlives its parent."""

import http.client
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs.demo import encodings
from jobs.demo.scenes import Scene
from jobs.demo.web import SLOW_S, DemoWeb
from pipelines.errors import UserError

PICTURE = encodings.jpeg(Scene("red", "star", "large", "left"), 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("web")
    (root / "images").mkdir()
    (root / "images" / "000001.jpg").write_bytes(PICTURE)
    (root / "secret.txt").write_text("not a picture")
    return root


@pytest.fixture(scope="module")
def port(root: Path) -> Iterator[int]:
    with DemoWeb(root) as web:
        yield web.port


def get(port: int, path: str, timeout_s: float = 60) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    connection.request("GET", path, headers={"Host": "pictures.demo.ldm"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("folder", ["images", "copies"])
def test_a_picture_is_served_as_it_is(port: int, folder: str) -> None:
    status, headers, body = get(port, f"/{folder}/000001.jpg")
    assert (status, headers["Content-Type"], body) == (200, "image/jpeg", PICTURE)


def test_what_is_not_there_is_a_404(port: int) -> None:
    assert get(port, "/images/000002.jpg")[0] == 404
    assert get(port, "/missing/000001.jpg")[0] == 404


@pytest.mark.parametrize("path", ["/images/../secret.txt", "/images/..%2fsecret.txt", "/images/%2e%2e%2fsecret.txt"])
def test_no_file_outside_the_pictures_is_served(port: int, path: str) -> None:
    assert get(port, path)[0] == 404


def test_a_flaky_picture_fails_once_and_then_comes(port: int) -> None:
    assert get(port, "/flaky/000001.jpg")[0] == 500
    assert get(port, "/flaky/000001.jpg")[::2] == (200, PICTURE)


def test_a_truncated_picture_cannot_be_decoded(port: int) -> None:
    status, _, body = get(port, "/truncated/000001.jpg")
    assert status == 200
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(body)).load()


def test_a_page_an_empty_body_and_a_redirect(port: int) -> None:
    assert get(port, "/page/000001.jpg")[1]["Content-Type"].startswith("text/html")
    assert get(port, "/empty/000001.jpg")[::2] == (200, b"")
    status, headers, _ = get(port, "/moved/000001.jpg")
    assert (status, headers["Location"]) == (302, "/images/000001.jpg")


def test_the_slow_host_is_slow_and_the_hanging_one_does_not_answer(port: int) -> None:
    began = time.monotonic()
    assert get(port, "/slow/000001.jpg", timeout_s=60)[2] == PICTURE
    # Timers may be a little early.
    assert time.monotonic() - began > SLOW_S - 0.1
    with pytest.raises(TimeoutError):
        get(port, "/hang/000001.jpg", timeout_s=0.5)


def test_an_occupied_port_is_one_clear_line(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"127.0.0.1:{number}: Address already in use; choose another port"
        ) as error:
            DemoWeb(root, port=number).__enter__()
    assert "\n" not in str(error.value)


def test_a_port_that_cannot_be_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="port must be 0-65535"):
        DemoWeb(root, port=70000).__enter__()


def test_the_web_stops_on_exit(root: Path) -> None:
    with DemoWeb(root) as web:
        assert get(web.port, "/images/000001.jpg")[0] == 200
    assert not listens(web.port)


def test_the_web_dies_with_a_parent_that_was_killed(root: Path) -> None:
    program = (
        "import time\n"
        "from jobs.demo.web import DemoWeb\n"
        f"web = DemoWeb({str(root)!r}).__enter__()\n"
        "print(web.port, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    port = int(parent.stdout.readline())
    assert get(port, "/images/000001.jpg")[0] == 200
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 120
    while listens(port):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.1)
