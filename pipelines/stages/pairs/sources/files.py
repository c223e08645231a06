"""Reading files of any store: what is there, ranges of bytes, many at once."""

from __future__ import annotations

import os
import stat

import fsspec

from pipelines.stages.pairs.rows import RejectedError
from pipelines.store.ranges import is_local


def read_file(filesystem: fsspec.AbstractFileSystem, path: str, max_bytes: int) -> bytes:
    """The bytes of a file of one row, at most `max_bytes`.

    Raises:
        RejectedError: `missing_file`, `unreadable_file` or `too_large`.
    """
    try:
        if is_local(filesystem):
            # A pipe or a device named as a picture would block the shard for ever.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise RejectedError("missing_file")
            with open(path, "rb") as file:
                data = file.read(max_bytes + 1)
        else:
            data = bytes(filesystem.cat_file(path, start=0, end=max_bytes + 1))
    except RejectedError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise RejectedError("missing_file") from None
    # One row's name may be anything, and each store's client has its own classes for refusing it.
    except Exception:
        raise RejectedError("unreadable_file") from None
    if len(data) > max_bytes:
        raise RejectedError("too_large")
    return data
