"""What was learnt of a source's files when it was opened, so that no store is asked for each of them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.store.location import FileFacts, Location


@dataclass(frozen=True)
class Listing:
    """Facts of files, from listings.

    Args:
        files: by their path in the file system.
        folder: path of a folder all of whose files are among them, at any depth; None if there is none.
    """

    files: Mapping[str, FileFacts] = field(default_factory=dict)
    folder: str | None = None

    def facts(self, file: Location) -> FileFacts | None:
        """Return a file's facts, by one request if it was not listed; None if there is no such file."""
        found = self.files.get(file.path)
        if found is not None or (self.folder is not None and file.path.startswith(f"{self.folder.rstrip('/')}/")):
            return found
        return file.facts(forbidden_is_missing=True)


UNLISTED = Listing()
