"""The Kubernetes manifests, against KubeRay's published schemas."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

MANIFEST = Path(__file__).parents[2] / "infra" / "kuberay" / "rayjob.yaml"


@pytest.fixture(scope="session")
def ray_job_schema(shared_data: Path) -> dict[str, Any]:
    for path in sorted((shared_data / "kuberay").rglob("*.yaml")):
        definition = yaml.safe_load(path.read_text())
        if definition.get("spec", {}).get("names", {}).get("kind") == "RayJob":
            versions = {version["name"]: version for version in definition["spec"]["versions"]}
            schema: dict[str, Any] = versions["v1"]["schema"]["openAPIV3Schema"]
            return schema
    pytest.skip("no RayJob schema in ../shared/data/kuberay")


@pytest.mark.shared
def test_the_ray_job_fits_kuberays_schema_without_unknown_fields(ray_job_schema: dict[str, Any]) -> None:
    manifest = yaml.safe_load(MANIFEST.read_text())
    jsonschema.validate(manifest, ray_job_schema)
    assert _unknown(manifest["spec"], ray_job_schema["properties"]["spec"]) == []


@pytest.mark.shared
def test_a_misspelt_field_is_found(ray_job_schema: dict[str, Any]) -> None:
    spec = {**yaml.safe_load(MANIFEST.read_text())["spec"], "entrypoynt": "ldm"}
    assert _unknown(spec, ray_job_schema["properties"]["spec"]) == ["entrypoynt"]


def _unknown(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """Return the fields that the API server would drop silently."""
    if isinstance(value, list):
        return [name for item in value for name in _unknown(item, schema.get("items", {}), place)]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    known = schema["properties"]
    unknown = [f"{place}{name}" for name in value if name not in known]
    return unknown + [
        inner for name in value if name in known for inner in _unknown(value[name], known[name], f"{place}{name}.")
    ]
