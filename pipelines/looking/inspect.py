"""What is in an artifact, a shard, a run's root or a model folder, as facts for people and scripts."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.looking.verify import finished_artifacts
from pipelines.shards.format import decode_npy, read_shard
from pipelines.store.ledger import COMMITS, MANIFEST, read_manifest
from pipelines.store.storage import Storage

FIRST_SAMPLES = 5
MODEL_FILES = ("model.safetensors", "config.json")


def inspect_path(url: str) -> dict[str, Any]:
    """Facts of whatever lies there; `kind` says what it is: shard, artifact, unfinished, root or model.

    Returns:
        JSON values only.

    Raises:
        UserError: there is nothing there, nothing that this knows, or a damaged file.
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
    if all(storage.exists(name) for name in MODEL_FILES):
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
        f"model folder ({', '.join(MODEL_FILES)})"
    )


def write_contact_sheet(url: str, target: Path) -> None:
    """Draw random samples of a pairs artifact (finished or not) or of one shard into a PNG file.

    Raises:
        UserError: there is no tar with pictures, or the file cannot be written.
    """
    from pipelines.drawing.grids import encode_png
    from pipelines.shards.tar_windows import Tar
    from pipelines.stages.pairs.shard.staged import WORK
    from pipelines.stages.pairs.summary.contact_sheet import contact_sheet, tars_of
    from pipelines.stages.pairs.summary.unfinished import staged_tars

    storage = Storage(url)
    if url.endswith(".tar"):
        folder, _, name = storage.url.rpartition("/")
        if (size := Storage(folder).size(name)) < 0:
            raise UserError(f"{storage.url} is missing")
        tars = [Tar(Storage(folder), name, size)]
    else:
        # Before anything is committed there are staged shards.
        tars = tars_of(storage) or staged_tars(storage / WORK)
    sheet = contact_sheet(tars)
    if sheet is None:
        raise UserError(
            f"{storage.url} has no samples with pictures: give an artifact of pairs or a shard (.tar) of one"
        )
    try:
        target.write_bytes(encode_png(sheet))
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror}): say another place") from None


def _shard(storage: Storage) -> dict[str, Any]:
    """Facts of one tar: samples, files a sample, shapes of arrays, the first keys and captions."""
    folder, _, name = storage.url.rpartition("/")
    samples = 0
    extensions: set[str] = set()
    first: list[dict[str, Any]] = []
    with Storage(folder).open(name) as file:
        for sample in read_shard(file):
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


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Key and captions of a sample, dtype and shape of its arrays."""
    facts: dict[str, Any] = {"key": sample["__key__"]}
    captions = json.loads(sample.get("json", b"{}")).get("captions")
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
    shards = [record for record in manifest.files if record.name.endswith(".tar")]
    first: list[dict[str, Any]] = []
    for record in shards:
        if record.rows:
            with storage.open(record.name) as file:
                first = [_sample(sample) for sample in islice(read_shard(file), FIRST_SAMPLES)]
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
    }


def _summary(storage: Storage) -> dict[str, Any]:
    """One line's worth of an artifact."""
    manifest = read_manifest(storage)
    return {
        "url": storage.url,
        "stage": manifest.stage,
        "key": manifest.key,
        "rows": manifest.rows,
        "bytes": manifest.bytes,
        "files": len(manifest.files),
        "seconds": manifest.seconds,
    }


def _is_unfinished(storage: Storage) -> bool:
    from pipelines.stages.pairs.shard.staged import WORK

    return storage.exists(COMMITS) or storage.exists(WORK)


def _unfinished_artifacts(root: Storage) -> list[Storage]:
    """Folders `STAGE/KEY` under a root with something in them, but without a manifest."""
    folders = [root / stage / key for stage in root.names("*") for key in (root / stage).names("*")]
    return [folder for folder in folders if not folder.exists(MANIFEST) and _is_unfinished(folder)]


def _unfinished(storage: Storage) -> dict[str, Any]:
    """How far an artifact is that a run makes now, or was making when it ended."""
    from pipelines.stages.pairs.shard.staged import WORK
    from pipelines.stages.pairs.stage import STAGE
    from pipelines.stages.pairs.summary.unfinished import survey

    stage, key = storage.url.rstrip("/").split("/")[-2:]
    details = survey(storage, storage / WORK) if stage == STAGE.name else {}
    return {
        "kind": "unfinished",
        "url": storage.url,
        "stage": stage,
        "key": key,
        "committed_files": len((storage / COMMITS).names("*.json")),
        "details": details,
    }


def _model(storage: Storage) -> dict[str, Any]:
    """Facts of a model folder: its config, and parameters by part, from the header of the weights alone."""
    return {
        "kind": "model",
        "url": storage.url,
        "bytes": sum(storage.size(name) for name in MODEL_FILES),
        "config": storage.read_json("config.json"),
        "parameters": _parameters(storage),
    }


def _parameters(storage: Storage) -> dict[str, int]:
    # A safetensors file begins with the length of its JSON header (little-endian, 8 bytes).
    with storage.open("model.safetensors") as file:
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
        raise UserError(f"{storage.url}/model.safetensors is not a safetensors file; it is damaged") from error
    return parameters | {"total": sum(parameters.values())}
