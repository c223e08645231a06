"""Our pairs stage as the command line runs it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tests.benchmarks.pairs_server import RunningServer
from tests.benchmarks.tool_run import ToolRun, run_tool

CONNECTIONS = 128


def overrides(urls: Path, image_size: int, connections: int) -> tuple[str, ...]:
    """Return what is laid over the recipe `small`, whose other stages must fit the image size too."""
    settings = {
        "pairs.source": urls,
        "pairs.image_size": image_size,
        "diffusion.unet.latent_size": image_size // 8,
        "pairs.resize": "keep_ratio",
        "pairs.quality": 95,
        "pairs.rows_per_shard": 1000,
        "pairs.workers": 2,
        "pairs.download.allow_private_addresses": "true",
        "pairs.download.connections": connections,
        "pairs.download.connections_per_host": connections,
        "tracking.enabled": "false",
    }
    return tuple(f"{name}={value}" for name, value in settings.items())


def run_ours(
    urls: Path,
    output: Path,
    server: RunningServer,
    *,
    rows: int,
    size: tuple[int, int],
    connections: int = CONNECTIONS,
) -> ToolRun:
    """Run `ldm run small --only pairs` at two workers; `min(size)` px on the shorter side, JPEG 95, 1,000 a shard.

    Deduplication stays on, as it is by default.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command = [sys.executable, "-m", "jobs.cli", "run", "small", "--only", "pairs", "--root", str(output)]
    command += [part for override in overrides(urls, min(size), connections) for part in ("--set", override)]
    return run_tool(command, output, server, rows=rows, size=size, env=dict(os.environ))
