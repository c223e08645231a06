"""`ldm doctor`: check what this machine has."""

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

import click
import psutil

from jobs.console import console, emit_json, json_option
from pipelines.drawing.formatting import format_bytes
from pipelines.errors import UserError
from pipelines.secrets import without_secrets
from pipelines.store.storage import Storage

PACKAGES = (
    "torch",
    "ray",
    "mlflow",
    "webdataset",
    "transformers",
    "open_clip_torch",
    "fsspec",
    "s3fs",
    "pyarrow",
    "pillow",
)


@click.command()
@click.option(
    "--root",
    default="runs",
    show_default=True,
    help="A folder or fsspec URL to check for reading and writing.",
)
@json_option
def doctor(root: str, as_json: bool) -> None:
    """Check what this machine has: cores, memory, GPUs, packages, Ray, and whether the storage can be written.

    \b
    Example:
      ldm doctor --root s3://bucket/ldm
    """
    facts = {
        "python": platform.python_version(),
        "machine": _machine(),
        "gpus": _gpus(),
        "packages": {name: _version(name) for name in PACKAGES},
        "ray": _ray(),
        "storage": _storage(root),
    }
    out = console(as_json)
    for name, value in facts.items():
        lines = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in lines:
            out.print(f"{name:<9} {key:<16} {item}", markup=False)
    healthy = facts["storage"]["writable"] and all(facts["packages"].values())  # type: ignore[index,attr-defined]
    if as_json:
        emit_json({**facts, "healthy": healthy})
    if not healthy:
        raise UserError(f"this machine cannot run ldm on {root}: see the lines above")


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "cores": os.cpu_count(),
        "memory": format_bytes(memory.total),
        "memory free": format_bytes(memory.available),
        "shared memory": format_bytes(shutil.disk_usage("/dev/shm").free) if os.path.isdir("/dev/shm") else "none",
        "python": sys.executable,
    }


def _gpus() -> dict[str, str]:
    import torch

    from ldm_core.prepare import c_compiler

    if not torch.cuda.is_available():
        return {"": "none: training runs on the CPU"}
    names = {}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        names[f"cuda:{i}"] = f"{properties.name}, {format_bytes(properties.total_memory)}"
    return {**names, "C compiler": c_compiler() or "none: networks will run uncompiled, which is slower"}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ray() -> dict[str, str]:
    address = os.environ.get("RAY_ADDRESS")
    token = os.environ.get("RAY_AUTH_TOKEN") or os.path.exists(os.path.expanduser("~/.ray/auth_token"))
    return {
        "address": without_secrets(address or "") or "none set: `ldm run` starts Ray on this machine",
        "auth token": "found" if token else "none yet: Ray makes one at its first start",
    }


def _storage(root: str) -> dict[str, Any]:
    storage = Storage(root)
    facts: dict[str, Any] = {"url": storage.url, "writable": False}
    try:
        storage.write_bytes(".doctor", b"ldm")
        facts["writable"] = storage.read_bytes(".doctor") == b"ldm"
        storage.remove(".doctor")
    except Exception as error:
        facts["problem"] = without_secrets(" ".join(str(error).split()))[:200]
    if storage.is_local and facts["writable"]:
        facts["free"] = format_bytes(shutil.disk_usage(storage.path()).free)
    return facts
