"""img2dataset from the Python registry, in an environment of its own, with the settings that compare."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.pairs_server import RunningServer
from tests.benchmarks.tool_run import ToolRun, run_tool

# Its last release, with the wandb of its time (which wants an older setuptools) and the albumentations and pandas that
# it allows. Of everything else the newest: with them it is as fast as with those of its time.
REQUIREMENTS = ("img2dataset==1.47.0", "albumentations==1.4.24", "pandas<3", "setuptools<80", "wandb==0.17.9")
_TOLD = ("img2dataset", "albumentations", "opencv-python-headless", "numpy", "pyarrow", "webdataset")


def environment(scratch: Path, *, install: bool = True) -> Path | None:
    """Return the environment's folder, made on first use; None if it is absent and must not, or cannot, be made."""
    folder = scratch / "img2dataset-env"
    ready = folder / "ready"
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if ready.exists():
        return folder
    if not install or uv is None:
        return None
    try:
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", "3.11", folder], check=True)
        subprocess.run(
            [
                uv,
                "pip",
                "install",
                "--quiet",
                "--compile-bytecode",
                "--python",
                folder / "bin" / "python",
                *REQUIREMENTS,
            ],
            check=True,
        )
    except subprocess.CalledProcessError as error:
        print(f"img2dataset cannot be installed here ({error}): its part is left out", file=sys.stderr)
        return None
    ready.touch()
    return folder


def versions(folder: Path) -> dict[str, str]:
    """Return the versions of the packages that its speed depends on."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {_TOLD!r}}}))"
    found: dict[str, str] = json.loads(subprocess.check_output([folder / "bin" / "python", "-c", code]))
    return found


def run_peer(
    folder: Path, urls: Path, output: Path, server: RunningServer, *, rows: int, size: tuple[int, int], threads: int
) -> ToolRun:
    """Run its whole command at two processes; 256 px on the shorter side, JPEG 95, 1,000 a shard."""
    shutil.rmtree(output, ignore_errors=True)
    settings = {
        "url_list": urls,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": output,
        "output_format": "webdataset",
        "processes_count": 2,
        "thread_count": threads,
        "number_sample_per_shard": 1000,
        "image_size": min(size),
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_quality": 95,
        "extract_exif": False,  # We do not keep it either.
        "enable_wandb": False,
    }
    command = [str(folder / "bin" / "img2dataset"), *(f"--{name}={value}" for name, value in settings.items())]
    env = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    return run_tool(command, output, server, rows=rows, size=size, env=env)
