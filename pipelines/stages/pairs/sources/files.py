"""Reading the file of one row."""

from __future__ import annotations

import os
import stat

from pipelines.stages.pairs.rows import RejectedError
from pipelines.store.location import Location


def read_file(file: Location, max_bytes: int) -> bytes:
    """Read the bytes of a file of one row, at most `max_bytes`.

    Raises:
        RejectedError: `missing_file`, `unreadable_file` or `too_large`.
    """
    try:
        # A pipe or a device named as a picture would block the shard for ever.
        if file.is_local and not stat.S_ISREG(os.stat(file.path).st_mode):
            raise RejectedError("missing_file")
        data = file.read_range(0, max_bytes + 1)
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
