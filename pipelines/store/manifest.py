"""The manifest of an artifact: written last, it says that the artifact is finished, and all that a reader must know."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.errors import UserError
from pipelines.store.failures import MissingFileError
from pipelines.store.file_table import FileTable
from pipelines.store.storage import Storage

MANIFEST = "manifest.json"
# Of the ledger: what lies under a root, and how keys are made. Roots of other versions are refused.
LEDGER_VERSION: Final = 2


class Manifest(BaseModel):
    """Contents of `manifest.json`.

    Attributes:
        ledger: version of the ledger.
        stage, key: which artifact it is.
        format_version: version of the stage's files.
        code_version: version of the package that made it.
        config: the stage's section of the recipe, with all defaults.
        identity: what the key is the hash of.
        upstream: references of the artifacts it was made from, by stage.
        details: the stage's own facts about its result.
        seconds: how long it took.
        rows, bytes, files: samples, size and number of its files.
        table: name of the file with the table of its files.
        content: digest of its files, logs left out: of two artifacts with equal ones either is as good.
        made_from: `content` of the upstream artifacts that it depends on, by stage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ledger: Literal[2] = LEDGER_VERSION
    stage: str
    key: str
    format_version: int
    code_version: str
    config: dict[str, Any]
    identity: dict[str, Any]
    upstream: dict[str, str]
    details: dict[str, Any]
    seconds: float
    rows: int
    bytes: int
    files: int
    table: str
    content: str
    made_from: dict[str, str]


def read_manifest(storage: Storage) -> Manifest:
    """Read the manifest of an artifact's folder.

    Raises:
        UserError: it is missing, not a manifest, or of an earlier version.
    """
    try:
        values = json.loads(storage.read_bytes(MANIFEST))
    except ValueError as error:
        raise UserError(f"{storage.url}/{MANIFEST} is not valid JSON ({error}): {_DAMAGED}") from error
    if isinstance(values, dict) and "stage" in values and "ledger" not in values:
        raise UserError(f"{storage.url} was made by ldm 0.1: {TOO_OLD}")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{storage.url}/{MANIFEST} is not a manifest ({place}: {first['msg']}): {_DAMAGED}") from error


_DAMAGED = "it was damaged after it was written; run `ldm run RECIPE --force` with the stage's name to rebuild it"
TOO_OLD = (
    "its artifacts are not read by this version; choose another --root, and make pairs from its tars without "
    "downloading again: --set pairs.source='OLD_ROOT/pairs/KEY/*.tar'"
)


def read_files(storage: Storage, table: str) -> FileTable:
    """Read the table of an artifact's files.

    Args:
        storage: the artifact's folder.
        table: the table's name, from the manifest.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with storage.local_copy(table) as path:
            return FileTable.open(path)
    except FileNotFoundError:
        raise MissingFileError(f"{storage.url}/{table} is missing") from None
    except ValueError as error:
        raise UserError(f"{storage.url}/{table} is not a table of files ({error}): {_DAMAGED}") from error


def write_files(storage: Storage, files: FileTable) -> dict[str, Any]:
    """Write the table of an artifact's files; return what the manifest says of it."""
    data = files.encode()
    # By its content: a reader of the manifest before this one still finds the table that it names.
    name = f"files-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    storage.write_bytes(name, data)
    return {"rows": files.rows, "bytes": files.bytes, "files": len(files), "table": name}
