"""Something small on every node; what the workers of a running cluster are given of the driver's environment."""

import os
from pathlib import Path

import pytest

from pipelines.compute import cluster
from pipelines.compute.nodes import on_every_node


def test_a_call_is_made_on_every_node_in_a_process_of_its_own(ray_cluster: None, tmp_path: Path) -> None:
    on_every_node(lambda: (tmp_path / str(os.getpid())).touch())
    (caller,) = tmp_path.iterdir()
    assert caller.name != str(os.getpid())


def test_a_call_that_fails_is_not_the_end(ray_cluster: None) -> None:
    on_every_node(lambda: os.remove("/nowhere"))


def test_what_nodes_must_know_is_handed_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cluster.HANDED_ON:
        monkeypatch.delenv(name, raising=False)
    assert cluster._workers_environment() == {}
    monkeypatch.setenv("LDM_CACHE", "/cache")
    monkeypatch.setenv("LDM_CACHE_GIB", "180")
    assert cluster._workers_environment() == {
        "runtime_env": {"env_vars": {"LDM_CACHE": "/cache", "LDM_CACHE_GIB": "180"}}
    }
    # As in a job that was submitted with one of them, which Ray refuses to have twice.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"LDM_CACHE": "/cache"}}}')
    assert cluster._workers_environment() == {"runtime_env": {"env_vars": {"LDM_CACHE_GIB": "180"}}}
