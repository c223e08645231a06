"""What tests of shards share."""

from pathlib import Path

import pytest

from pipelines.shards.node_cache import cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a node's cache of its own; return the folder that it is in while somebody uses it.

    Otherwise a shard of another test with the same bytes would be found in it.
    """
    monkeypatch.setenv("LDM_CACHE", str(tmp_path_factory.mktemp("node") / "disk"))
    return cache_folder()
