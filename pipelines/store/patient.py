"""A file system for libraries that bring no patience of their own: every request is repeated as ours are."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.patience import expect_answers
from pipelines.store.filesystems import filesystem_of
from pipelines.store.object_store import attempt


@dataclass(frozen=True)
class PatientFileSystem:
    """The fsspec file system of a URL, for small files: what is written is sent when it is closed.

    Picklable; the process that it is sent to is patient with every store from the first request on.

    Attributes:
        url: a folder in it; names the store.
    """

    url: str

    def __reduce__(self) -> tuple[Callable[[str], PatientFileSystem], tuple[str]]:
        return _arrived, (self.url,)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for special methods before there is a URL.
        if name.startswith("__") or name == "url":
            raise AttributeError(name)
        value = getattr(filesystem_of(self.url)[0], name)
        return partial(self._call, value) if callable(value) else value

    def _call(self, request: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return attempt(self.url, lambda: request(*args, **options))

    def rm(self, path: str, **options: Any) -> None:
        """Remove a file or folder, if it is there: the answer to an earlier try may have been lost."""
        with contextlib.suppress(FileNotFoundError):
            self._call(filesystem_of(self.url)[0].rm, path, **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """Open a whole file for reading, or a new one for writing; there are no other modes.

        Raises:
            FileNotFoundError: there is none to read.
            ValueError: another mode.
        """
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        if mode == "wb":
            return _SentWhenClosed(partial(self.pipe_file, path))
        raise ValueError(f"mode must be rb or wb, got {mode!r}")


def _arrived(url: str) -> PatientFileSystem:
    """Make the file system in a process of a library's own, which nobody else tells that its driver has the store."""
    expect_answers()
    return PatientFileSystem(url)


class _SentWhenClosed(io.BytesIO):
    def __init__(self, send: Callable[[bytes], None]) -> None:
        super().__init__()
        self._send = send

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._send(data)
