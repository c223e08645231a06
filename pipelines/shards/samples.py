"""What a sample of a tar is: WebDataset's convention, in the one place that all readers of tars share.

`a/000070042.left.jpg` is the file `left.jpg` of the sample `a/000070042`: the key is the path up to the first dot of
the file's name. Members of one key that follow each other are one sample.

The shards of our artifacts are more regular than tars may be, and are held to that by `shard_samples`: whoever reads or
verifies one goes through it, and they refuse the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from pipelines.shards.tar_headers import FOLDER, Bytes, Member, TarError, members, shown

T = TypeVar("T")

# Of one sample, whose files are held in memory together.
MOST_FILES = 1024
MOST_SAMPLE_BYTES = 2**29
# Of one text or json file, which take several times their size when they are decoded.
MOST_TEXT_BYTES = 2**25
TEXT_EXTENSIONS = ("txt", "json")
# Of one shard: the keys that were seen are kept.
MOST_SAMPLES = 2**20
# Of one shard: an index takes memory for each of them at every sample.
MOST_EXTENSIONS = 64

# Offset and size of a file in its tar; no size for what is not a regular file, which is never read.
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
        if member.kind == FOLDER or (name := split_name(member.name)) is None:
            continue
        key, extension = name
        if sample is None or sample.key != key or extension in sample.files:
            if sample is not None:
                yield sample
            sample = Sample(key, member.header, {})
        if len(sample.files) >= MOST_FILES:
            raise TarError(f"more than {MOST_FILES} files of the sample {shown(key)}")
        sample.files[extension] = look(member)
    if sample is not None:
        yield sample


def refuse(problem: str) -> NoReturn:
    """Raise TarError, for readers to which the first problem is the end."""
    raise TarError(problem)


def shard_samples(
    tar: Bytes, look: Callable[[Member], T], problem: Callable[[str], None] = refuse
) -> Iterator[Sample[T]]:
    """Yield the samples of a shard of ours: regular files of bounded size, whose keys are unique in the shard.

    (That they are unique among an artifact's shards follows from their being made of the shard's number.)

    Args:
        tar: the bytes.
        look: as for `samples`.
        problem: told of what does not belong in a shard, which is left out if this returns.

    Raises:
        TarError: truncated, damaged or not a tar, or larger than any shard.
    """
    seen: set[bytes] = set()
    extensions: set[str] = set()
    for sample in samples(_sound(members(tar), problem), look):
        # Digests: names can be long.
        digest = hashlib.blake2b(sample.key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        if digest in seen:
            problem(f"a second sample {shown(sample.key)}")
            continue
        if len(seen) >= MOST_SAMPLES:
            raise TarError(f"more than {MOST_SAMPLES} samples")
        seen.add(digest)
        extensions |= sample.files.keys()
        if len(extensions) > MOST_EXTENSIONS:
            raise TarError(f"files of more than {MOST_EXTENSIONS} extensions")
        yield sample


def _sound(found: Iterable[Member], problem: Callable[[str], None]) -> Iterator[Member]:
    """Pass on the regular files, as long as those of a sample fit into memory together."""
    of, total = None, 0
    for member in found:
        if member.kind == FOLDER:
            continue
        if member.size is None:
            problem(f"{shown(member.name)} is a {member.kind}")
            continue
        key, extension = split_name(member.name) or (None, "")
        total = member.size + (total if key == of else 0)
        of = key
        if extension.rpartition(".")[2] in TEXT_EXTENSIONS and member.size > MOST_TEXT_BYTES:
            problem(f"{shown(member.name)} is a text of {member.size} bytes, more than {MOST_TEXT_BYTES}")
        elif key is not None and total > MOST_SAMPLE_BYTES:
            problem(f"the sample {shown(key)} has {total} bytes, more than {MOST_SAMPLE_BYTES}")
        else:
            yield member


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
    """Read a file's bytes. Raises TarError for what is no regular file, or if the tar ends before."""
    if member.size is None:
        raise TarError(f"{shown(member.name)} is a {member.kind}")
    return tar.read(member.offset, member.size)
