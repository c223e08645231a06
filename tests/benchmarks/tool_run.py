"""One run of a command-line tool against the server: checked for having delivered everything, then counted."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.benchmarks.pairs_server import Figures, RunningServer
from tests.benchmarks.process_tree import TreeUse, measure

_ROW_GROUP = 100_000


@dataclass(frozen=True)
class ToolRun:
    """A whole command, from its start to its end, and the part of it in which rows are worked on.

    Attributes:
        rows: pictures delivered.
        tree: the command with all its processes.
        server: what the server did meanwhile.
        finished: time.monotonic() of the last file beside the tars.
    """

    rows: int
    tree: TreeUse
    server: Figures
    finished: float

    @property
    def startup_s(self) -> float:
        """From the start of the command to the first request that the server saw."""
        return (self.server.first_request or self.tree.started) - self.tree.started

    @property
    def startup_cpu_s(self) -> float:
        return self.tree.cpu_s_until(self.tree.started + self.startup_s)

    @property
    def work_s(self) -> float:
        """From the first request to the last file of the output."""
        return self.finished - self.tree.started - self.startup_s

    @property
    def work_cpu_s(self) -> float:
        return self.tree.cpu_s_until(self.finished) - self.startup_cpu_s

    def figures(self) -> dict[str, float]:
        """Return what the JSON says; `images_*` are of the whole command, `work_*` without start-up and shutdown."""
        return {
            "images": self.rows,
            "wall_s": self.tree.wall_s,
            "cpu_s": self.tree.cpu_s,
            "images_per_s": self.rows / self.tree.wall_s,
            "images_per_cpu_s": self.rows / self.tree.cpu_s,
            "startup_s": self.startup_s,
            "startup_cpu_s": self.startup_cpu_s,
            "work_s": self.work_s,
            "work_cpu_s": self.work_cpu_s,
            "work_images_per_s": self.rows / self.work_s,
            "work_images_per_cpu_s": self.rows / self.work_cpu_s,
            "server_cpu_s": self.server.cpu_s,
            "server_cpu_us_per_request": self.server.cpu_us_per_request,
            "server_connections": self.server.connections,
        }

    def busiest(self, count: int = 8) -> list[dict[str, str | float]]:
        """Return the processes that took most CPU time, with their peak memory."""
        return [
            {"name": _short_name(each.name), "cpu_s": each.cpu_s, "peak_rss_mib": each.peak_rss_bytes / 2**20}
            for each in self.tree.processes[:count]
        ]


def run_tool(
    command: list[str], output: Path, server: RunningServer, *, rows: int, size: tuple[int, int], env: dict[str, str]
) -> ToolRun:
    """Run a tool that reads `rows` pictures from the server and writes tars somewhere below `output`.

    Raises:
        SystemExit: the tool failed, or did not deliver every row as a JPEG of `size` (width, height).
    """
    log = output.with_suffix(".log")
    server.take_figures()
    tree = measure(command, log=log, env=env)
    figures = server.take_figures()
    if tree.code:
        raise SystemExit(f"{' '.join(command)} ended with {tree.code}; the end of {log}:\n{log.read_text()[-2000:]}")
    delivered = sum(1 for picture in pictures_of(output) if picture == size)
    if delivered != rows:
        raise SystemExit(f"{command[0]} delivered {delivered} of {rows} pictures of {size}: see {output} and {log}")
    # Beside the tars lies what says that they are finished; elsewhere may be what a tool does on its way out.
    folders = {path.parent for path in output.rglob("*.tar")}
    last = max(path.stat().st_mtime for folder in folders for path in folder.iterdir())
    return ToolRun(rows, tree, figures, finished=last - time.time() + time.monotonic())


def pictures_of(folder: Path) -> Iterator[tuple[int, int]]:
    """Return width and height of every JPEG in the tars below a folder."""
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    with Image.open(io.BytesIO(file.read())) as image:
                        yield image.size


def _short_name(command_line: str) -> str:
    """Return `python log_monitor.py` of all that Ray calls its processes with."""
    words = [word for word in command_line.split() if not word.startswith("-")]
    return " ".join(Path(word).name for word in words[:2])


def write_urls(path: Path, server: RunningServer, rows: int) -> Path:
    """Write a parquet of `rows` URLs of the server with captions; the columns are `url` and `caption`."""
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, _ROW_GROUP):
            numbers = range(start, min(start + _ROW_GROUP, rows))
            captions = [f"photograph number {number}, with {number % 7} things in it" for number in numbers]
            writer.write_table(pa.table([[server.url(number) for number in numbers], captions], schema=schema))
    return path


def dump(values: object) -> str:
    """Return figures as JSON, floats with four significant digits."""
    return json.dumps(json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.4g}")))
