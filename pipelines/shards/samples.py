"""What a sample of a tar is: WebDataset's convention, in the one place that all readers of tars share.

`a/000070042.left.jpg` is the file `left.jpg` of the sample `a/000070042`: the key is the path up to the first dot of
the file's name. Members of one key that follow each other are one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipelines.shards.tar_headers import Bytes, Member, TarError

T = TypeVar("T")

# Offset and size of a file in its tar; no size for sparse files, which are never read: they can claim any size.
Span = tuple[int, int | None]


@dataclass(frozen=True)
class Sample(Generic[T]):
    """One sample of a tar.

    Attributes:
        key: its name, unique in a shard.
        header: offset of its first header in the tar.
        files: what is known of each file, by extension, in the tar's order: its contents, or its span.
    """

    key: str
    header: int
    files: dict[str, T]

    def first(self, extensions: tuple[str, ...]) -> T | None:
        """Return the file with the first of these extensions; `left.jpg` counts if there is no `jpg`."""
        exact = next((self.files[e] for e in extensions if e in self.files), None)
        if exact is not None:
            return exact
        return next((file for e, file in self.files.items() if e.rpartition(".")[2] in extensions), None)


def samples(found: Iterable[Member], look: Callable[[Member], T]) -> Iterator[Sample[T]]:
    """Group a tar's members into samples.

    Args:
        found: the members, in order.
        look: what to keep of a member. It is called before the next header is read, so that a reader of contents never
            goes back: over a network that would fetch them twice.
    """
    sample: Sample[T] | None = None
    for member in found:
        if not member.is_file or (name := split_name(member.name)) is None:
            continue
        key, extension = name
        if sample is None or sample.key != key or extension in sample.files:
            if sample is not None:
                yield sample
            sample = Sample(key, member.header, {})
        sample.files[extension] = look(member)
    if sample is not None:
        yield sample


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into a sample's key and an extension in lower case; None if it is no part of a sample."""
    folder, _, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    # Without a stem it is what file managers leave behind (`._0001.jpg`).
    if not stem or not dot:
        return None
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def span(member: Member) -> Span:
    """Keep where a file is, not what it holds."""
    return member.offset, member.size


def contents(tar: Bytes, member: Member) -> bytes:
    """Read a file's bytes. Raises TarError for a sparse file, or if the tar ends before."""
    if member.size is None:
        raise TarError(f"{member.name} is a sparse file")
    return tar.read(member.offset, member.size)
