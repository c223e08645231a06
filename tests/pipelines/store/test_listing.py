"""Listings of large folders: many pages at once, the same names as one page after the other would give."""

from __future__ import annotations

import bisect
import threading
from typing import Any

import pytest

from pipelines.store.listing import FOLDER, list_s3


class _Bucket:
    """Answers ListObjectsV2 as S3 does: a page of `page` names after `StartAfter`, folders as one name each."""

    def __init__(self, keys: list[str], page: int) -> None:
        self.keys, self.page = sorted(keys), page
        self.requests = 0
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def call_s3(self, name: str, *, Bucket: str, Prefix: str, Delimiter: str, StartAfter: str = "") -> dict[str, Any]:
        assert (name, Bucket, Delimiter) == ("list_objects_v2", "bucket", "/")
        with self._lock:
            self.requests += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        contents: list[dict[str, Any]] = []
        folders: list[str] = []
        position = bisect.bisect_right(self.keys, max(StartAfter, Prefix))
        while position < len(self.keys) and len(contents) + len(folders) < self.page:
            key = self.keys[position]
            if not key.startswith(Prefix):
                break
            first, slash, _ = key[len(Prefix) :].partition("/")
            if slash:
                folders.append(f"{Prefix}{first}/")
                position = bisect.bisect_left(self.keys, f"{Prefix}{first}0")
            else:
                contents.append({"Key": key, "Size": len(first)})
                position += 1
        more = position < len(self.keys) and self.keys[position].startswith(Prefix)
        with self._lock:
            self._now -= 1
        return {"Contents": contents, "CommonPrefixes": [{"Prefix": each} for each in folders], "IsTruncated": more}


SHARDS = [f"{number:06d}.{kind}" for number in range(5000) for kind in ("parquet", "tar")]
OTHERS = ["manifest.json", "files-1.parquet", ".lock.json", "commits/000000.tar.json", "commits/x", "stats/000000.json"]


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["manifest.json"],
        SHARDS,
        SHARDS + OTHERS,
        # Gaps, as of a run that was killed, and numbers that begin anywhere.
        [name for number, name in enumerate(SHARDS) if number % 700 < 300][77:] + OTHERS,
        SHARDS[4321:],
        # Several files a shard, so that a page ends within one.
        [f"{number:06d}.{width}x64.tar" for number in range(400) for width in range(64, 640, 64)],
        [f"{number:06d}.tar" for number in range(999_000, 1_000_000)]
        + [f"{n}.tar" for n in range(1_000_000, 1_000_500)],
        [f"picture {number}.jpg" for number in range(3000)],
        [f"folder-{number}/a" for number in range(2500)],
    ],
)
@pytest.mark.parametrize("page", [7, 100, 1000])
def test_a_listing_in_parts_finds_what_is_there(names: list[str], page: int) -> None:
    if page == 7:
        names = names[:300] + names[-20:]
    bucket = _Bucket([f"root/latents/{name}" for name in names] + ["root/latents2/000000.tar", "root/a"], page)
    found = list_s3(bucket, "bucket/root/latents", lambda request: request())
    expected: dict[str, int] = {}
    for name in names:
        first, slash, _ = name.partition("/")
        expected[first] = FOLDER if slash else len(first)
    assert found == expected


def test_pages_of_shards_are_asked_for_at_once_and_hardly_more_of_them_than_needed() -> None:
    names = [f"{number:06d}.tar" for number in range(200_000)]
    bucket = _Bucket([f"root/{name}" for name in names], 1000)
    assert len(list_s3(bucket, "bucket/root", lambda request: request())) == 200_000
    assert bucket.requests < 200 * 1.4


def test_a_folder_of_one_page_takes_one_request() -> None:
    bucket = _Bucket([f"root/{number:06d}.tar" for number in range(1000)], 1000)
    list_s3(bucket, "bucket/root", lambda request: request())
    assert bucket.requests == 1
