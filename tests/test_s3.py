"""The fast S3 server on loopback is as good as S3 for everything that storage asks of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from pipelines.errors import UserError
from pipelines.store import filesystems, object_store
from pipelines.store.location import Location
from pipelines.store.storage import Storage
from tests.benchmarks.s3_objects import SortedKeys
from tests.pipelines.store.s3 import KEY_ID, SECRET
from tests.s3 import BUCKET, FastS3, fast_s3

MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[FastS3]:
    with fast_s3() as running:
        yield running


@pytest.fixture
def root(server: FastS3, use_s3: Callable[[str], None], request: pytest.FixtureRequest) -> Storage:
    use_s3(server.url)
    server.take_figures()
    return Storage(f"s3://{BUCKET}/{request.node.name}")


def test_what_is_written_is_read_listed_copied_and_removed(root: Storage, tmp_path: Path) -> None:
    root.write_bytes("a b&<é>+%.bin", b"0123456789")
    root.write_json("sub/b.json", {"x": 1})
    root.write_bytes("empty", b"")
    assert root.names() == ["a b&<é>+%.bin", "empty", "sub"]
    assert root.sizes() == {"a b&<é>+%.bin": 10, "empty": 0}
    assert root.read_bytes("a b&<é>+%.bin") == b"0123456789"
    assert root.read_range("a b&<é>+%.bin", 2, 5) == b"234"
    assert Location.of(f"{root.url}/a b&<é>+%.bin").read_tail(3) == b"789"
    with root.open("a b&<é>+%.bin") as file:
        assert file.seek(7) == 7
        assert file.read() == b"789"
    assert root.exists("sub")
    assert not root.exists("nothing")
    assert (root.size("sub/b.json"), root.size("nothing")) == (12, -1)
    assert abs(root.modified_at("empty") - time.time()) < 60
    root.copy("sub/b.json", root / "copies", "c.json")
    assert (root / "copies").read_json("c.json") == {"x": 1}
    root.download("sub/b.json", tmp_path / "d.json")
    assert (tmp_path / "d.json").stat().st_size == 12
    assert sorted(Location.of(root.url).files_below()) == [
        root.path(name) for name in ("a b&<é>+%.bin", "copies/c.json", "empty", "sub/b.json")
    ]
    root.remove("sub")
    assert root.names() == ["a b&<é>+%.bin", "copies", "empty"]
    root.remove()
    assert not root.exists()
    with pytest.raises(UserError, match="is missing"):
        root.read_bytes("empty")


def test_large_files_go_up_in_parts_and_come_whole(
    root: Storage, server: FastS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * MIB)
    data = bytes(range(256)) * (64 << 10)
    root.write_bytes("a.tar", data)
    requests = server.take_figures().requests
    assert (requests["CreateMultipartUpload"], requests["UploadPart"], requests["CompleteMultipartUpload"]) == (1, 4, 1)
    root.download("a.tar", tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == root.read_bytes("a.tar") == data


def test_uploads_that_nobody_finished_are_listed_and_aborted(root: Storage, server: FastS3) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        config=Config(retries={"total_max_attempts": 1}),
    )
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=f"{root.name}/a")["UploadId"]
    place = {"Bucket": BUCKET, "Key": f"{root.name}/a", "UploadId": upload}
    part = client.upload_part(**place, PartNumber=3, Body=b"abc")
    (listed,) = client.list_parts(**place)["Parts"]
    assert (listed["PartNumber"], listed["Size"], listed["ETag"]) == (3, 3, part["ETag"])
    with pytest.raises(client.exceptions.ClientError, match="InvalidPart"):
        client.complete_multipart_upload(**place, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})
    root.remove_leftovers()
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET, Prefix=root.name)
    with pytest.raises(client.exceptions.ClientError, match="NoSuchUpload"):
        client.upload_part(**place, PartNumber=4, Body=b"abc")
    assert client.get_bucket_location(Bucket=BUCKET)["LocationConstraint"] is None
    assert BUCKET in [each["Name"] for each in client.list_buckets()["Buckets"]]


def test_conditions_hold_and_of_many_that_create_a_file_one_does(root: Storage) -> None:
    with ThreadPoolExecutor(8) as threads:
        told = list(threads.map(lambda i: root.create("lock", f"{i}".encode()), range(32)))
    assert sum(told) == 1
    assert root.read_bytes("lock") == f"{told.index(True)}".encode()
    first = root.version("lock")
    assert first is not None
    assert root.replace("absent", b"0", first) is None
    second = root.replace("lock", b"second", first)
    assert second == root.version("lock") != first
    assert root.replace("lock", b"3", first) is None
    assert root.read_bytes("lock") == b"second"


def test_pages_of_a_listing_hold_every_key_once_in_order(root: Storage, server: FastS3) -> None:
    names = [f"{i:06d}.tar" for i in range(2500)] + [f"sub{i}/x{j}" for i in range(1200) for j in range(2)]
    server.add_objects((f"{root.name}/{name}", 10**9) for name in names)
    server.add_objects([(f"{root.name}-beside", "text")])
    assert root.sizes() == dict.fromkeys(names[:2500], 10**9)
    assert root.names() == sorted({name.partition("/")[0] for name in names})
    server.take_figures()
    below = Location.of(root.url).files_below()
    assert [path.partition(f"{root.name}/")[2] for path in below] == sorted(names)
    assert server.take_figures().requests["ListObjectsV2"] == 5
    assert root.read_range("000000.tar", 10, 14) == bytes(4)
    root.remove()
    assert root.names() == []
    assert Storage(f"s3://{BUCKET}").read_bytes(f"{root.name}-beside") == b"text"


def test_sorted_keys_stay_sorted_while_blocks_split_and_empty() -> None:
    keys, numbers = SortedKeys(), [i * 7919 % 10_007 for i in range(10_007)]
    for number in numbers:
        keys.add(f"{number:05d}")
    for number in numbers[::2]:
        keys.remove(f"{number:05d}")
    left = sorted(f"{number:05d}" for number in numbers[1::2])
    assert [key for block in keys.since("") for key in block] == left
    assert [key for block in keys.since(left[4000]) for key in block] == left[4000:]
    for key in left:
        keys.remove(key)
    assert [key for block in keys.since("") for key in block] == []


def test_requests_that_come_together_are_delayed_together(root: Storage, server: FastS3) -> None:
    root.write_bytes("a", b"1")
    server.take_figures()
    server.set_delay(1.0)
    try:
        start = time.monotonic()
        with ThreadPoolExecutor(20) as threads:
            assert sum(threads.map(root.size, ["a"] * 20)) == 20
        # One after the other they would take 20 s.
        assert 1.0 <= time.monotonic() - start < 20
    finally:
        server.set_delay(0.0)
    figures = server.take_figures()
    assert figures.requests == {"HeadObject": 20}
    assert figures.most_at_once > 1
    assert server.take_figures().count == 0


@pytest.mark.parametrize("kind", ["unavailable", "closed"])
def test_an_outage_refuses_everything_until_it_ends(
    kind: str, root: Storage, server: FastS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "REQUEST_ATTEMPTS", 2)
    with server.outage(kind), ThreadPoolExecutor(1) as thread:  # type: ignore[arg-type]
        written = thread.submit(root.write_bytes, "a", b"1")
        until = time.monotonic() + 240
        refused = 0
        while refused < 2:
            assert time.monotonic() < until
            refused += server.take_figures().requests.get("Refused", 0)
            time.sleep(0.05)
        assert not written.done()
        server.end_outage()
        written.result()
    assert root.read_bytes("a") == b"1"
