"""What tests share: one Ray for the whole session, the shared data where it is there, and no state of PyTorch."""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines import patience
from pipelines.compute.cluster import connect
from pipelines.compute.config import ClusterConfig
from tests.torch_state import SEED, torch_state

if TYPE_CHECKING:
    from tests.pipelines.store.s3 import S3

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A developer's own server is not for tests.
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Hundreds of processes import the package: compiled once, not in each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Threads of several processes on the same cores wait for each other by spinning. Set before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
# Files that take more than half a minute, the slowest first.
SLOWEST = (
    "pipelines/training/test_fit.py",
    "jobs/test_demo.py",
    "pipelines/compute/test_actor_pool.py",
    "faults/test_killed_anywhere.py",
    "pipelines/stages/latents/test_latents_stage.py",
    "pipelines/stages/pairs/test_pairs_s3.py",
    "pipelines/stages/pairs/test_pairs_stage.py",
    "jobs/test_submit.py",
    "pipelines/stages/pairs/test_pairs_killed.py",
    "pipelines/compute/test_chain.py",
    "pipelines/conditions/test_stages.py",
    "pipelines/stages/evaluate/test_evaluate_stage.py",
    "pipelines/tracking/test_tracking.py",
    "jobs/test_real_pictures.py",
    "pipelines/store/test_lock.py",
    "pipelines/inspection/test_garbage.py",
    "jobs/test_nothing_tells_secrets.py",
    "benchmarks/test_bench_ledger.py",
    "pipelines/store/test_storage_s3.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first: one that began last would run alone at the end."""
    rank = {REPOSITORY / "tests" / name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what runs leave in a person's home in a folder of this session, that of processes started by tests too.

    Fetched shards as well.
    """
    os.environ["LDM_HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ["LDM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def no_torch_state_is_shared() -> Iterator[None]:
    """Give every test the same random numbers, and fail a test that leaves a global setting of PyTorch changed.

    Otherwise a test's numbers, and at worst its result, would depend on which tests ran before it. A process that has
    not imported PyTorch, for tests that have no use for it, is spared the import.
    """
    if "torch" not in sys.modules:
        yield
        return
    import torch

    torch.manual_seed(SEED)
    before = torch_state()
    yield
    after = torch_state()
    left = {name: f"{before[name]} -> {value}" for name, value in after.items() if value != before[name]}
    assert not left, f"the test must put back the global state of PyTorch that it changed: {left}"


@pytest.fixture
def own_threads() -> Iterator[None]:
    """Let a test change PyTorch's number of threads, as a worker does when it starts; put it back afterwards."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of four logical CPUs for all tests of the session."""
    with connect(ClusterConfig(cpus=4)):
        yield


@pytest.fixture
def no_actor_is_left(ray_cluster: None) -> Iterator[None]:
    """Free the CPUs of a pool in which a worker died: Ray Data leaves its actors to the garbage collector."""
    yield
    gc.collect()


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


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[S3]":
    """One S3 server on loopback for all tests of the session; tests keep to a prefix of their own."""
    from tests.pipelines.store.s3 import S3

    server = S3()
    yield server
    server.close()


@pytest.fixture
def use_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Points s3fs at a server, by URL, for this test alone."""
    import s3fs

    from tests.pipelines.store.s3 import environment

    def use(url: str) -> None:
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        # Another server: it has not answered yet.
        patience._outages.clear()

    yield use
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(s3_server: "S3", use_s3: Callable[[str], None]) -> "S3":
    """The S3 server, reached directly."""
    use_s3(s3_server.url)
    return s3_server
