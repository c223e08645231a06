"""What tests share: one Ray for the whole session, and the shared data where it is there."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster import ClusterConfig, connect

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of four logical CPUs for all tests of the session."""
    with connect(ClusterConfig(cpus=4)):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs beside the repository; the test is skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return SHARED / "data"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 300 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or not mount:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], check=False).returncode:
        pytest.skip("this machine does not allow mounting a small file system")
    yield folder
    # Lazily: a writer that failed may still hold its file.
    subprocess.run(["umount", "--lazy", folder], check=True)
