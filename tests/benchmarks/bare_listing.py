"""A bare listing of an artifact's objects: what the ledger's work is held against.

Shards have numbers for names, so it is known where each page of a thousand keys begins, and all pages are asked for at
once, over as many connections as pay. The client library is the one that s3fs uses; nothing of ours takes part.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import uvloop
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

CONNECTIONS = 64
PAGE_KEYS = 1000


class Numbered(NamedTuple):
    """Files of shards: `FOLDERNNNNNN.…` for the numbers below `shards`, so many files each."""

    folder: str
    shards: int
    files: int


class Listed(NamedTuple):
    """What a listing found, how long it took and how many pages it asked for. Making the client is not counted."""

    objects: int
    seconds: float
    requests: int


def list_objects(endpoint: str, bucket: str, prefix: str, numbered: Sequence[Numbered]) -> Listed:
    """List every object below a prefix (which ends in "/"), side by side."""
    return uvloop.run(_list(endpoint, bucket, prefix, numbered))


async def _list(endpoint: str, bucket: str, prefix: str, numbered: Sequence[Numbered]) -> Listed:
    session = get_session()
    # Parsing dates would take most of a page's time, and nobody asks for them.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    config = AioConfig(max_pool_connections=CONNECTIONS)
    async with session.create_client("s3", endpoint_url=endpoint, config=config) as client:
        await client.head_bucket(Bucket=bucket)
        started = time.perf_counter()
        found: dict[str, int] = {}
        requests = 0
        waiting = asyncio.Semaphore(CONNECTIONS)

        async def page(folder: str, after: str, **options: Any) -> dict[str, Any]:
            nonlocal requests
            requests += 1
            async with waiting:
                answer: dict[str, Any] = await client.list_objects_v2(
                    Bucket=bucket, Prefix=prefix + folder, StartAfter=prefix + folder + after, **options
                )
            found.update({each["Key"]: each["Size"] for each in answer.get("Contents", [])})
            return answer

        async def rest(after: str) -> None:
            """List what stands beside the numbers in the artifact's own folder."""
            answer = await page("", after, Delimiter="/")
            while answer["IsTruncated"]:
                answer = await page("", answer["Contents"][-1]["Key"].removeprefix(prefix), Delimiter="/")

        pages = [
            page(group.folder, f"{first:06d}" if first else "")
            for group in numbered
            for first in range(0, group.shards, PAGE_KEYS // group.files)
        ]
        own = max((group.shards for group in numbered if not group.folder), default=0)
        await asyncio.gather(rest(f"{own:06d}" if own else ""), *pages)
        return Listed(len(found), time.perf_counter() - started, requests)
