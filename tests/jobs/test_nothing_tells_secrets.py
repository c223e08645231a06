"""Nothing that a run or a submission leaves behind holds a secret of its environment."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.pipelines.store.s3 import BUCKET, SECRET, SESSION, environment
from tests.tiny import tiny_recipe, write_pictures, write_recipe

if TYPE_CHECKING:
    from tests.pipelines.store.s3 import S3

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 300
CLOSE_WITHIN_S = 3.0
PASSWORD = "password-that-must-never-be-seen"
TOKEN = "token-that-must-never-be-seen"
SECRETS = [
    each.encode() for each in (PASSWORD, TOKEN, SECRET, SESSION, b64encode(f"user:{PASSWORD}".encode()).decode())
]

# `ldm`, which at the end waits for a server that refuses everything for seconds, not for half a minute.
LDM = f"""
import functools
from jobs import cli
from pipelines.tracking.tracker import Tracker

Tracker.close = functools.partialmethod(Tracker.close, {CLOSE_WITHIN_S})
cli.main()
"""


class _Server(BaseHTTPRequestHandler):
    """Remembers every request. What is answered goes by verb and path up to the last slash; the rest is an error."""

    seen: list[tuple[str, str, str, bytes]]
    answers: dict[tuple[str, str], tuple[int, object]]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.command, self.path, self.headers.get("Authorization", ""), body))
        status, answer = self.answers.get((self.command, self.path.rpartition("/")[0]), (500, {}))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def server() -> Iterator[tuple[int, type[_Server]]]:
    handler = type("Handler", (_Server,), {"seen": [], "answers": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http.server_port, handler
        http.shutdown()


def files_with_secrets(*folders: Path) -> list[str]:
    # Unlike Path.rglob, os.walk passes over folders that go meanwhile: Ray is still ending.
    found = (Path(place, name) for folder in folders for place, _, names in os.walk(folder) for name in names)
    files = [path for path in found if path.is_file() and not path.is_symlink()]
    assert files
    return [str(path) for path in files if any(secret in bytes_if_there(path) for secret in SECRETS)]


def bytes_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@pytest.mark.e2e
def test_a_run_leaves_no_secret_in_the_root_at_home_in_logs_and_in_titles_of_processes(
    tmp_path: Path, s3_server: S3, server: tuple[int, type[_Server]]
) -> None:
    port, mlflow = server
    for name in ("work", "home", "tmp"):
        (tmp_path / name).mkdir()
    recipe = write_recipe(tmp_path / "work/tiny.yaml", tiny_recipe(write_pictures(tmp_path / "work/pictures", 20)))
    root = f"secrets-{tmp_path.name}"
    # Not pytest's folder: Ray's sockets do not take long paths.
    with tempfile.TemporaryDirectory(prefix="ldm-ray-", ignore_cleanup_errors=True) as ray_folder:
        command = [sys.executable, "-c", LDM, "--debug", "run", str(recipe), "--json"]
        process = subprocess.Popen(
            [*command, "--only", "pairs", "--root", f"s3://{BUCKET}/{root}"],
            cwd=tmp_path / "work",
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            | environment(s3_server.url)
            | {
                "PYTHONPATH": str(REPOSITORY),
                "LDM_HOME": str(tmp_path / "home"),
                "TMPDIR": str(tmp_path / "tmp"),
                "RAY_TMPDIR": ray_folder,
                "MLFLOW_TRACKING_URI": f"http://user:{PASSWORD}@127.0.0.1:{port}",
                "SOME_TOKEN": TOKEN,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        titles: set[str] = set()
        watching = threading.Thread(target=_watch_titles, args=(process, titles))
        watching.start()
        out, err = process.communicate(timeout=PATIENCE_S)
        watching.join()
        assert process.returncode == 0, err.decode()
        assert any(Path(ray_folder).rglob("*.log")), "Ray's logs were not where they are searched"
        assert files_with_secrets(tmp_path / "work", tmp_path / "home", tmp_path / "tmp", Path(ray_folder)) == []

    assert any("--debug" in title for title in titles)
    assert any("raylet" in title for title in titles)
    objects = {key: s3_server.read(key) for key in s3_server.objects(root)}
    assert {"report.html", "manifest.json"} <= {key.rpartition("/")[2] for key in objects}
    for name, told in {"stdout": out, "stderr": err, "titles": "\n".join(titles).encode(), **objects}.items():
        assert not any(secret in told for secret in SECRETS), name
    # The password was used all the same, and what could not be sent waits at home, not in the working directory.
    expected = f"Basic {b64encode(f'user:{PASSWORD}'.encode()).decode()}"
    assert {authorization for _, _, authorization, _ in mlflow.seen} == {expected}
    assert json.loads(out.splitlines()[-1])["tracking_uri"] == f"http://user:***@127.0.0.1:{port}"
    assert list((tmp_path / "home").glob(f"{root}-*/.tracking/*/session-*/events.jsonl"))
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"tiny.yaml", "pictures"}


def _watch_titles(process: subprocess.Popen[bytes], titles: set[str]) -> None:
    while process.poll() is None:
        try:
            watched = psutil.Process(process.pid)
            for each in (watched, *watched.children(recursive=True)):
                titles.add(" ".join(each.cmdline()))
        except psutil.Error:
            pass
        time.sleep(0.1)


def test_a_submission_uploads_no_secret(
    ldm: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    server: tuple[int, type[_Server]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, cluster = server
    cluster.answers |= {
        ("GET", "/api"): (200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}),
        ("GET", "/api/packages/gcs"): (404, {}),
        ("PUT", "/api/packages/gcs"): (200, {}),
        ("POST", "/api/jobs"): (200, {"job_id": "raysubmit_1", "submission_id": "raysubmit_1"}),
    }
    for name, value in {**environment("http://127.0.0.1:9"), "SOME_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe("s3://bucket/pairs.parquet"))
    options = (recipe, "--root", "s3://bucket/run", "--address", f"http://127.0.0.1:{port}")
    code, _, err = ldm("submit", *options)
    assert code == 2
    assert "set tracking.uri, or MLFLOW_TRACKING_URI here and on the cluster, or tracking.enabled=false" in err
    assert not cluster.seen, "it is refused before anything is sent"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{PASSWORD}@mlflow:5000")
    code, out, err = ldm("submit", *options, "--json")
    assert code == 0, err
    (package,) = (body for verb, path, _, body in cluster.seen if verb == "PUT" and "/packages/" in path)
    with zipfile.ZipFile(io.BytesIO(package)) as files:
        contents = {name: files.read(name) for name in files.namelist()}
    assert {"recipe.yaml", "jobs/cli.py", "pipelines/errors.py", "ldm_core/ema.py"} <= contents.keys()
    assert b"s3://bucket/run" in contents["recipe.yaml"]
    requests = {f"{verb} {path}": body for verb, path, _, body in cluster.seen if "/packages/" not in path}
    assert "POST /api/jobs/" in requests
    for name, sent in {**contents, **requests, "output": (out + err).encode()}.items():
        assert not any(secret in sent for secret in SECRETS), name
