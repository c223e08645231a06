"""The objects of an S3 bucket, in memory: sorted keys, pages of listings, bodies that may be zeros nobody stores."""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import quote
from xml.sax.saxutils import escape

_BLOCK_KEYS = 1000
# No key compares greater than its prefix and this.
_LAST = chr(sys.maxunicode)


@dataclass(slots=True)
class S3Object:
    """One object; `body` None stands for `size` zeros."""

    size: int
    etag: str
    modified: float
    body: bytes | None = None
    metadata: dict[str, str] | None = None

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes start to stop - 1."""
        return bytes(stop - start) if self.body is None else self.body[start:stop]


@dataclass
class Upload:
    """A multipart upload that is neither completed nor aborted; `parts` by their number."""

    key: str
    metadata: dict[str, str]
    parts: dict[int, S3Object] = field(default_factory=dict)

    def whole(self, numbers: Iterable[int], modified: float) -> S3Object:
        """Join parts. Raises KeyError for a part that was not uploaded."""
        parts = [self.parts[number] for number in numbers]
        digest = hashlib.md5(b"".join(bytes.fromhex(part.etag) for part in parts)).hexdigest()
        bodies = [part.body for part in parts if part.body is not None]
        body = b"".join(bodies) if len(bodies) == len(parts) else None
        size = sum(part.size for part in parts)
        return S3Object(size, f"{digest}-{len(parts)}", modified, body, self.metadata)


class SortedKeys:
    """Strings in order, in blocks, so that a million of them take another one in microseconds."""

    def __init__(self) -> None:
        self._blocks: list[list[str]] = [[]]
        # The least that each block may hold.
        self._least = [""]

    def add(self, key: str) -> None:
        """Add a key that is not there."""
        index = bisect_right(self._least, key) - 1
        block = self._blocks[index]
        insort(block, key)
        if len(block) > 2 * _BLOCK_KEYS:
            self._blocks[index : index + 1] = [block[:_BLOCK_KEYS], block[_BLOCK_KEYS:]]
            self._least.insert(index + 1, block[_BLOCK_KEYS])

    def remove(self, key: str) -> None:
        """Remove a key that is there."""
        index = bisect_right(self._least, key) - 1
        block = self._blocks[index]
        del block[bisect_left(block, key)]
        if not block and index:
            del self._blocks[index], self._least[index]

    def since(self, key: str) -> Iterator[list[str]]:
        """Yield the keys not less than `key`, in order, some at a time."""
        index = bisect_right(self._least, key) - 1
        yield self._blocks[index][bisect_left(self._blocks[index], key) :]
        for later in range(index + 1, len(self._blocks)):
            yield self._blocks[later]


@dataclass(frozen=True)
class Page:
    """A page of a listing: keys, common prefixes, and after what the next one begins (None: it is the last)."""

    keys: list[str]
    prefixes: list[str]
    next: str | None


class Bucket:
    """A bucket's objects by key, in the order that S3 lists them, and its unfinished uploads."""

    def __init__(self) -> None:
        self.objects: dict[str, S3Object] = {}
        self.uploads: dict[str, Upload] = {}
        self._keys = SortedKeys()

    def put(self, key: str, value: S3Object) -> None:
        if key not in self.objects:
            self._keys.add(key)
        self.objects[key] = value

    def delete(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            self._keys.remove(key)

    def page(self, prefix: str, delimiter: str, after: str, count: int) -> Page:
        """Return at most `count` keys and common prefixes that begin with `prefix` and come after `after`."""
        if delimiter and (end := after.find(delimiter, len(prefix))) >= 0 and after.startswith(prefix):
            # That common prefix has been listed, with all that is below it.
            after = after[: end + len(delimiter)] + _LAST
        if delimiter:
            return self._page_by_folder(prefix, delimiter, after, count)
        keys = self._below(prefix, after, count + 1)
        return Page(keys[:count], [], keys[count - 1] if len(keys) > count else None)

    def _page_by_folder(self, prefix: str, delimiter: str, after: str, count: int) -> Page:
        keys: list[str] = []
        prefixes: list[str] = []
        last = after
        while found := self._below(prefix, last, count + 1 - len(keys) - len(prefixes)):
            for key in found:
                if len(keys) + len(prefixes) == count:
                    return Page(keys, prefixes, last.removesuffix(_LAST))
                if (end := key.find(delimiter, len(prefix))) >= 0:
                    prefixes.append(key[: end + len(delimiter)])
                    last = prefixes[-1] + _LAST
                    break
                keys.append(key)
                last = key
        return Page(keys, prefixes, None)

    def _below(self, prefix: str, after: str, count: int) -> list[str]:
        found: list[str] = []
        # No key lies between a key and the same with a zero at its end.
        for keys in self._keys.since(max(prefix, after + "\0")):
            found += keys[: count - len(found)]
            if len(found) == count or (found and not found[-1].startswith(prefix)):
                break
        return found[: bisect_right(found, prefix + _LAST)]


def render_page(bucket: Bucket, name: str, page: Page, asked: dict[str, str], count: int) -> bytes:
    """Return the XML of a page of ListObjectsV2.

    Args:
        bucket: whose objects they are.
        name: of the bucket.
        page: what to render.
        asked: the parameters of the request.
        count: at most so many entries were asked for.
    """
    encode = _encode_urls if asked.get("encoding-type") == "url" else _escape
    objects = bucket.objects
    entries = [
        f"<Contents><Key>{shown}</Key><LastModified>{iso_time(int((found := objects[key]).modified))}</LastModified>"
        f"<ETag>&quot;{found.etag}&quot;</ETag><Size>{found.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key, shown in zip(page.keys, encode(page.keys), strict=True)
    ]
    folders = [f"<CommonPrefixes><Prefix>{shown}</Prefix></CommonPrefixes>" for shown in encode(page.prefixes)]
    echoed = {"prefix": "Prefix", "delimiter": "Delimiter", "start-after": "StartAfter"}
    facts = [f"<{tag}>{encode([asked[key]])[0]}</{tag}>" for key, tag in echoed.items() if key in asked]
    if "encoding-type" in asked:
        facts.append("<EncodingType>url</EncodingType>")
    if "continuation-token" in asked:
        facts.append(f"<ContinuationToken>{escape(asked['continuation-token'])}</ContinuationToken>")
    if page.next is not None:
        facts.append(f"<NextContinuationToken>{page.next.encode().hex()}</NextContinuationToken>")
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult><Name>{name}</Name><MaxKeys>{count}</MaxKeys>'
        f"<KeyCount>{len(entries) + len(folders)}</KeyCount><IsTruncated>{str(page.next is not None).lower()}"
        f"</IsTruncated>{''.join(facts)}{''.join(entries)}{''.join(folders)}</ListBucketResult>"
    ).encode()


def _encode_urls(texts: list[str]) -> list[str]:
    # All at once where that can be: `quote` is quick only for texts that need no quoting.
    joined = "".join(texts)
    return texts if quote(joined) == joined else [quote(text) for text in texts]


def _escape(texts: list[str]) -> list[str]:
    return [escape(text) for text in texts]


@functools.lru_cache
def iso_time(second: int) -> str:
    """Return a second since 1970 as listings show it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(second))
