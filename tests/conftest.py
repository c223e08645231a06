"""What tests share: one Ray for the whole session, and the shared data where it is there."""

import os
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
