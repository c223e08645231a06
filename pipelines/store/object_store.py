"""Requests to object stores: retried while they can succeed later, then explained on one line without credentials.

Two layers of retries. s3fs repeats one request, so that a part of an upload or a range of a download is repeated, not
the file; `attempt` repeats the whole operation, more patiently.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipelines.errors import UserError
from pipelines.patience import Waiting, outage_of
from pipelines.store.failures import OWNING, code_and_status, explain_failure, is_transient, must_restart, reason_of
from pipelines.store.filesystems import PARTS_AT_ONCE, RANGE_BYTES, FileSystem, is_s3

T = TypeVar("T")

# How often an upload begins anew that was ended under it.
RESTARTS = 3
# Files of two parts and more go up part by part; a part that fails is sent again alone.
PART_BYTES = 16 << 20
# S3 takes no more; larger files get larger parts.
MAX_PARTS = 10_000


def attempt(url: str, operation: Callable[[], T], *, rights: str = OWNING) -> T:
    """Return what `operation` returns; it is repeated after transient failures, so it must be idempotent.

    For how long, and what is said meanwhile, is the matter of `patience`.

    Args:
        url: the file or folder it is about, for the message.
        operation: one or more requests.
        rights: what one must be allowed to do there, for the message.

    Raises:
        TransientError: the store did not recover in time; names `url` and what to do.
        UserError: the store refused for good; the same.
        Exception: what the operation raises that is no failure of a store, FileNotFoundError among it, unchanged.
    """
    waiting, restarts = Waiting(url), 0
    while True:
        try:
            result = operation()
        except Exception as error:
            passes = is_transient(error)
            if not passes and (isinstance(error, FileNotFoundError) or code_and_status(error)[0]):
                outage_of(url).answered()
            if (failure := explain_failure(url, error, rights=rights)) is None:
                raise
            restarts += must_restart(error)
            may_pass = passes or (must_restart(error) and restarts <= RESTARTS)
            if not may_pass or not waiting.pause(reason_of(error)):
                # Without the libraries' own errors, which hold whole requests.
                raise failure from None
        else:
            outage_of(url).answered()
            return result


def upload(url: str, store: FileSystem, local: Path, path: str, *, replace: bool = True) -> bool:
    """Put a local file under `path`, where it appears whole or not at all.

    Args:
        url: of the target, for messages.
        store: the file system.
        local: the file.
        path: the target.
        replace: whether a file that is there already is replaced. (Stores without conditional writes cannot tell of one
            that appears in the same moment.)

    Returns:
        Whether this file was put there. A file of which the first answer was lost is not known again: False.
    """
    size = local.stat().st_size
    try:
        return attempt(url, partial(_put_file, store, local, path, size, replace))
    finally:
        # If the answer to "begin an upload" was lost, nobody but the store knows of that upload, and its parts would
        # be paid for until somebody looked.
        if size >= 2 * PART_BYTES:
            abort_uploads(url, store, path)


def _put_file(store: FileSystem, local: Path, path: str, size: int, replace: bool) -> bool:
    if not is_s3(store):
        if not replace and store.exists(path):
            return False
        store.put_file(str(local), path)
        return True
    options = {"chunksize": max(PART_BYTES, math.ceil(size / MAX_PARTS)), "max_concurrency": PARTS_AT_ONCE}
    try:
        store.put_file(str(local), path, mode="overwrite" if replace else "create", **options)
    except OSError as error:
        code, status = code_and_status(error)
        if replace or (status != 412 and code != "NotImplemented" and not isinstance(error, FileExistsError)):
            raise
        if code != "NotImplemented" or store.exists(path):
            return False
        store.put_file(str(local), path, **options)
    return True


def copy(url: str, store: FileSystem, source: str, target: str) -> None:
    """Have the store copy a file within itself; `url` is the target's. Raises FileNotFoundError if there is none."""
    try:
        attempt(url, lambda: store.cp_file(source, target))
    finally:
        # Large files are copied in parts, which is an upload that may be lost track of like any other.
        abort_uploads(url, store, target)


def download(url: str, store: FileSystem, path: str, local: Path, size: int | None = None) -> None:
    """Fetch a file by ranges, a few at once; each of them is retried alone. None asks for the size."""
    if size is None:
        size = attempt(url, lambda: store.size(path))
    starts = list(range(0, size, RANGE_BYTES))
    with open(local, "wb") as file:
        for first in range(0, len(starts), PARTS_AT_ONCE):
            batch = starts[first : first + PARTS_AT_ONCE]
            for data in attempt(url, partial(_ranges, store, path, batch, size)):
                file.write(data)


def _ranges(store: FileSystem, path: str, starts: list[int], size: int) -> list[bytes]:
    ends = [min(start + RANGE_BYTES, size) for start in starts]
    found: list[bytes] = store.cat_ranges([path] * len(starts), starts, ends, on_error="raise")
    if [len(data) for data in found] != [end - start for start, end in zip(starts, ends, strict=True)]:
        # Some proxies end an answer early without saying so.
        raise ConnectionError("an answer ended early")
    return found


def read(store: FileSystem, path: str) -> bytes:
    """Read a whole file at once."""
    # s3fs asks for the size first if it may read in parallel: two requests for the small files that this is for.
    data: bytes = store.cat_file(path, max_concurrency=1) if is_s3(store) else store.cat_file(path)
    return data


def whole_sha256(store: FileSystem, path: str) -> str | None:
    """Return the sha256 that S3 keeps of a whole object, hexadecimal; None if it keeps none. One request.

    The digest of an object that was uploaded in parts is one of its parts' digests: it depends on their size.
    """
    bucket, key, _ = store.split_path(path)
    head = store.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    # Servers that do not tell the type may still have it of parts, which the ETag then says.
    in_parts = head.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT" or "-" in str(head.get("ETag", "-"))
    try:
        digest = b"" if in_parts else base64.b64decode(head.get("ChecksumSHA256", ""), validate=True)
    except ValueError:
        return None
    return digest.hex() if len(digest) == hashlib.sha256().digest_size else None


class Upload(NamedTuple):
    """A multipart upload that is neither completed nor aborted.

    Attributes:
        path: of the file that it would become, as the file system takes it.
        id: the store's name of it.
        begun: in seconds since 1970; 0 if the store does not say.
    """

    path: str
    id: str
    begun: float


def abort_uploads(url: str, store: FileSystem, path: str, *, below: bool = False) -> None:
    """Abort the unfinished uploads of a file, or of every file `below` a folder; what is finished stays."""
    if is_s3(store):
        # Not worth failing for: stores without this request, or credentials that may not make it.
        with contextlib.suppress(UserError):
            attempt(url, lambda: _abort_uploads(store, path, below))


def _abort_uploads(store: FileSystem, path: str, below: bool) -> None:
    for upload in uploads(store, path, below=below):
        abort_upload(store, upload)


def uploads(store: FileSystem, path: str, *, below: bool) -> Iterator[Upload]:
    """Yield the unfinished uploads of a file, or of every file `below` a folder; of an S3 store."""
    bucket, key, _ = store.split_path(path)
    # S3 lists by prefix, and `runs/demo` is also a prefix of `runs/demo2`. A bucket's root has no key to end.
    prefix = f"{key}/" if below and key else key
    page: dict[str, str] = {}
    while True:
        found = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **page)
        for each in found.get("Uploads", []):
            if below or each["Key"] == key:
                begun = each["Initiated"].timestamp() if "Initiated" in each else 0.0
                yield Upload(f"{bucket}/{each['Key']}", each["UploadId"], begun)
        if not found.get("IsTruncated"):
            return
        page = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}


def uploaded_bytes(store: FileSystem, upload: Upload) -> int:
    """Return the bytes of the parts of an unfinished upload."""
    bucket, key, _ = store.split_path(upload.path)
    total, page = 0, dict[str, int]()
    while True:
        try:
            found = store.call_s3("list_parts", Bucket=bucket, Key=key, UploadId=upload.id, **page)
        except FileNotFoundError:
            return total
        total += sum(int(part["Size"]) for part in found.get("Parts", []))
        if not found.get("IsTruncated"):
            return total
        page = {"PartNumberMarker": found["NextPartNumberMarker"]}


def abort_upload(store: FileSystem, upload: Upload) -> None:
    """Abort an upload, if it has not ended."""
    bucket, key, _ = store.split_path(upload.path)
    with contextlib.suppress(FileNotFoundError):
        store.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.id)


def version(store: FileSystem, path: str) -> str | None:
    """Return what names a file's present contents (its ETag; "" if the store has none); None if there is no file."""
    try:
        return str(store.info(path).get("ETag", ""))
    except FileNotFoundError:
        return None


def seconds_since_written(store: FileSystem, path: str) -> float | None:
    """Return how long ago a file was written, by the clock of its store alone; None if that does not tell the time."""
    if not is_s3(store):
        return None
    bucket, key, _ = store.split_path(path)
    head = store.call_s3("head_object", Bucket=bucket, Key=key)
    try:
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, ValueError):
        return None
    return float((now - head["LastModified"]).total_seconds())


def files_below(url: str, store: FileSystem, path: str) -> dict[str, Mapping[str, Any]]:
    """Return what a listing of S3 says of every object whose path begins so, by path."""
    bucket, key, _ = store.split_path(path)
    found: dict[str, Mapping[str, Any]] = {}
    page: dict[str, str] = {}
    while True:
        answer = attempt(url, partial(store.call_s3, "list_objects_v2", Bucket=bucket, Prefix=key, **page))
        for each in answer.get("Contents", []):
            found[f"{bucket}/{each['Key']}"] = {**each, "size": each["Size"]}
        if not answer.get("IsTruncated"):
            return found
        page = {"ContinuationToken": answer["NextContinuationToken"]}


def put_if(store: FileSystem, path: str, data: bytes, *, expected: str | None, writer: str) -> str | None:
    """Put a small file if what is there is `expected`: a version, or None for nothing.

    Stores other than S3 cannot do both at once; there, only the absence of a file is checked, beforehand.

    Args:
        writer: a token of this call, kept with the object, so that the call knows its own work when an answer was lost.

    Returns:
        The new version, or None if something else is there.
    """
    if not is_s3(store):
        return _put_checked(store, path, data, expected)
    bucket, key, _ = store.split_path(path)
    condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
    try:
        put = store.call_s3("put_object", Bucket=bucket, Key=key, Body=data, Metadata={"writer": writer}, **condition)
    except OSError as error:
        code, status = code_and_status(error)
        if code == "NotImplemented":
            return _put_checked(store, path, data, expected)
        # "If it is that version" of a file that is gone: not that version either.
        if status == 404 and code != "NoSuchBucket":
            return None
        if status != 412:
            raise
        # The condition failed, perhaps only on s3fs's second try, after the answer to a first that succeeded was lost.
        try:
            found = store.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            # Removed between the two requests: not ours.
            return None
        return str(found["ETag"]) if found.get("Metadata", {}).get("writer") == writer else None
    return str(put["ETag"])


def _put_checked(store: FileSystem, path: str, data: bytes, expected: str | None) -> str | None:
    if expected is None and store.exists(path):
        return None
    store.pipe_file(path, data)
    return version(store, path)
