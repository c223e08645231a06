"""Facts about an artifact, a shard, a run's root or a model folder, for people and scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_core.model_files import CONFIG_FILE, WEIGHTS_FILE
from pipelines.drawing.grids import encode_png
from pipelines.errors import UserError
from pipelines.inspection.verify import finished_artifacts
from pipelines.run.plan import STAGES
from pipelines.shards.format import decode_json, decode_npy, read_shard, read_with_facts
from pipelines.shards.index import index_name
from pipelines.store.commits import COMMITS
from pipelines.store.ledger import LEDGER, WORK, Artifact
from pipelines.store.manifest import MANIFEST, read_files, read_manifest
from pipelines.store.storage import Storage

if TYPE_CHECKING:
    from rich.console import RenderableType

FIRST_SAMPLES = 5
# Without either, a folder is no model.
REQUIRED_FILES = (WEIGHTS_FILE, CONFIG_FILE)


def inspect_path(url: str) -> dict[str, Any]:
    """Return facts about whatever lies there; `kind` says what it is: shard, artifact, unfinished, root or model.

    Returns:
        JSON values only.

    Raises:
        UserError: there is nothing there, nothing of a known kind, or a damaged file.
    """
    storage = Storage(url)
    if url.endswith(".tar"):
        return _shard(storage)
    if not storage.exists():
        raise UserError(
            f"nothing at {storage.url}: give a shard (.tar), an artifact's folder, a run's root or a model folder"
        )
    if storage.exists(MANIFEST):
        return _artifact(storage)
    if all(storage.exists(name) for name in REQUIRED_FILES):
        return _model(storage)
    if _is_unfinished(storage):
        return _unfinished(storage)
    artifacts, unfinished = finished_artifacts(storage), _unfinished_artifacts(storage)
    if artifacts or unfinished:
        return {
            "kind": "root",
            "url": storage.url,
            "artifacts": [_summary(artifact) for artifact in artifacts],
            "unfinished": [artifact.url for artifact in unfinished],
        }
    raise UserError(
        f"{storage.url} is neither a shard, nor an artifact ({MANIFEST} is missing), nor a run's root, nor a "
        f"model folder ({', '.join(REQUIRED_FILES)})"
    )


def write_contact_sheet(url: str, target: Path) -> None:
    """Draw samples of an artifact of pairs (finished or not) or latents, of a root's newest pairs or of one shard into
    a PNG file.

    Raises:
        UserError: there are no samples with pictures, or the file cannot be written.
    """
    storage, shard = Storage(url), None
    if url.endswith(".tar"):
        folder, _, shard = storage.url.rpartition("/")
        storage = Storage(folder)
    elif storage.exists(LEDGER):
        storage = _newest_with_pictures(storage)
    drawn = [stage for stage in STAGES if stage.contact_sheet]
    if storage.exists(MANIFEST):
        drawn = [stage for stage in drawn if stage.name == read_manifest(storage).stage] or drawn
    sheets = (stage.contact_sheet(storage, shard) for stage in drawn if stage.contact_sheet)
    if (sheet := next((sheet for sheet in sheets if sheet is not None), None)) is None:
        raise UserError(
            f"{url} has no samples with pictures: give an artifact of pairs, a finished one of latents, or a shard "
            "(.tar) of one"
        )
    try:
        target.write_bytes(encode_png(sheet))
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror}): say another place") from None


def _newest_with_pictures(root: Storage) -> Storage:
    """Return the artifact under a root whose samples can be drawn: of the first such stage the one finished last; the
    root if there is none.
    """
    finished = finished_artifacts(root)
    for stage in STAGES:
        found = [artifact for artifact in finished if artifact.url.split("/")[-2] == stage.name]
        if stage.contact_sheet and found:
            return max(found, key=lambda artifact: artifact.modified_at(MANIFEST))
    return root


def view(facts: dict[str, Any]) -> RenderableType | None:
    """Return the facts of an artifact as its stage shows them to people; None if they are shown as they are."""
    stage = next((stage for stage in STAGES if stage.name == facts.get("stage")), None)
    return stage.view(facts) if stage and stage.view and facts["kind"] in ("artifact", "unfinished") else None


def _shard(storage: Storage) -> dict[str, Any]:
    """Return facts about one tar: samples, files of a sample, shapes of arrays, the first keys and captions."""
    folder, _, name = storage.url.rpartition("/")
    samples = 0
    extensions: set[str] = set()
    first: list[dict[str, Any]] = []
    for sample in _samples(Storage(folder), name, has_index=Storage(folder).exists(index_name(name))):
        samples += 1
        extensions |= sample.keys() - {"__key__"}
        if len(first) < FIRST_SAMPLES:
            first.append(_sample(sample))
    return {
        "kind": "shard",
        "url": storage.url,
        "bytes": Storage(folder).size(name),
        "samples": samples,
        "extensions": sorted(extensions),
        "first_samples": first,
    }


def _samples(storage: Storage, shard: str, *, has_index: bool) -> Iterator[dict[str, Any]]:
    if has_index:
        yield from read_with_facts(storage, shard)
        return
    with storage.open(shard) as file:
        yield from read_shard(file)


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Return key and captions of a sample, dtype and shape of its arrays."""
    facts: dict[str, Any] = {"key": sample["__key__"]}
    captions = decode_json(sample.get("json", b"{}")).get("captions")
    if captions is None and "txt" in sample:
        captions = [sample["txt"].decode("utf-8", "replace")]
    if captions is not None:
        facts["captions"] = captions
    for extension, data in sample.items():
        if extension.endswith(".npy"):
            array = decode_npy(data)
            facts[extension] = f"{array.dtype} {list(array.shape)}"
    return facts


def _artifact(storage: Storage) -> dict[str, Any]:
    manifest = read_manifest(storage)
    files = read_files(storage, manifest.table)
    shards = files.shards()
    first: list[dict[str, Any]] = []
    for record in shards:
        if record.rows:
            found = _samples(storage, record.name, has_index=index_name(record.name) in files)
            first = [_sample(sample) for sample in islice(found, FIRST_SAMPLES)]
            break
    return _summary(storage) | {
        "kind": "artifact",
        "format_version": manifest.format_version,
        "code_version": manifest.code_version,
        "upstream": manifest.upstream,
        "config": manifest.config,
        "details": manifest.details,
        "shards": len(shards),
        "first_samples": first,
        **_looked_at(Artifact(manifest.stage, manifest.key, storage)),
    }


def _looked_at(artifact: Artifact) -> dict[str, Any]:
    stage = next((stage for stage in STAGES if stage.name == artifact.stage), None)
    # Of another version nobody knows how to read its samples.
    readable = stage is not None and stage.format_version == artifact.manifest.format_version
    return {"looked_at": stage.look(artifact)} if stage and stage.look and readable else {}


def _summary(storage: Storage) -> dict[str, Any]:
    """Return the facts of an artifact that fit on a line."""
    manifest = read_manifest(storage)
    return {
        "url": storage.url,
        "stage": manifest.stage,
        "key": manifest.key,
        "rows": manifest.rows,
        "bytes": manifest.bytes,
        "files": manifest.files,
        "seconds": manifest.seconds,
    }


def _is_unfinished(storage: Storage) -> bool:
    return storage.exists(COMMITS) or storage.exists(WORK)


def _unfinished_artifacts(root: Storage) -> list[Storage]:
    """Return the folders `STAGE/KEY` under a root that have something in them, but no manifest."""
    folders = [root / stage / key for stage in root.names("*") for key in (root / stage).names("*")]
    return [folder for folder in folders if not folder.exists(MANIFEST) and _is_unfinished(folder)]


def _unfinished(storage: Storage) -> dict[str, Any]:
    """Say how far an artifact is that a run is making now, or was making when it ended."""
    name, key = storage.url.rstrip("/").split("/")[-2:]
    stage = next((stage for stage in STAGES if stage.name == name), None)
    return {
        "kind": "unfinished",
        "url": storage.url,
        "stage": name,
        "key": key,
        "committed_files": len((storage / COMMITS).names("*.json")),
        "details": stage.survey(storage) if stage and stage.survey else {},
    }


def _model(storage: Storage) -> dict[str, Any]:
    """Return a model folder's config, and its parameters by part, from the header of the weights alone."""
    return {
        "kind": "model",
        "url": storage.url,
        "bytes": sum(storage.size(name) for name in REQUIRED_FILES),
        "config": storage.read_json(CONFIG_FILE),
        "parameters": _parameters(storage),
    }


def _parameters(storage: Storage) -> dict[str, int]:
    # A safetensors file begins with the length of its JSON header (little-endian, 8 bytes).
    with storage.open(WEIGHTS_FILE) as file:
        length = int.from_bytes(file.read(8), "little")
        header_bytes = file.read(length) if length <= 100_000_000 else b""
    try:
        header = json.loads(header_bytes)
        parameters: dict[str, int] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for side in entry["shape"]:
                    count *= side
                part = name.split(".", 1)[0]
                parameters[part] = parameters.get(part, 0) + count
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{storage.url}/{WEIGHTS_FILE} is not a safetensors file; it is damaged") from error
    return parameters | {"total": sum(parameters.values())}
