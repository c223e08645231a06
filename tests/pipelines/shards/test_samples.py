"""One idea of a sample: whoever reads a tar, in whichever way, finds the same samples in it."""

import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipelines.errors import UserError
from pipelines.inspection.verify import verify_shard
from pipelines.shards.format import read_shard
from pipelines.shards.reader import ShardReader
from pipelines.shards.samples import split_name
from pipelines.shards.tar_index import index_tar, samples_of
from pipelines.shards.tar_windows import Tar, random_samples
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.storage import Storage

FILES = {
    "a/one.jpg": b"1" * 700,
    "a/one.left.PNG": b"2",
    "a/._one.jpg": b"junk",
    "a/README": b"no sample",
    "b.c/one.txt": b"other folder",
    "b.c/two.txt": b"",
}
SAMPLES = {
    "a/one": {"jpg": b"1" * 700, "left.png": b"2"},
    "b.c/one": {"txt": b"other folder"},
    "b.c/two": {"txt": b""},
}


def write_tar(path: Path, *extra: tarfile.TarInfo) -> Path:
    """Write a tar as somebody else might: with folders and files that belong to no sample."""
    with tarfile.open(path, "w") as tar:
        for member in extra:
            tar.addfile(member)
        for name, data in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "a/one.jpg"
    return member


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "t.tar", special("a.d", tarfile.DIRTYPE))


def test_every_reader_finds_the_same_samples(tar: Path) -> None:
    data, url = tar.read_bytes(), str(tar)
    assert {str(sample.pop("__key__")): sample for sample in read_shard(tar)} == SAMPLES
    index = index_tar(url)
    assert {
        sample.key: {name: data[offset : offset + (size or 0)] for name, (offset, size) in sample.files.items()}
        for sample in samples_of(url, index, 0, index.rows)
    } == SAMPLES
    storage = Storage(str(tar.parent))
    assert dict(random_samples([Tar(storage, "t.tar", len(data))], 9)) == SAMPLES
    reader = ShardReader(storage, FileTable.of([FileRecord(name="t.tar", rows=3, bytes=len(data), sha256="00" * 32)]))
    assert {reader.key(0, row): reader.read(0, row) for row in range(len(SAMPLES))} == SAMPLES
    report = verify_shard(url)
    # What a Mac leaves beside a file is not looked into: no reader would.
    assert (report.rows, [problem.split(" is ")[0] for problem in report.problems]) == (
        3,
        ["t.tar: a/one.jpg", "t.tar: a/one.left.PNG"],
    )


def test_plain_webdataset_finds_them_too(tar: Path) -> None:
    found = webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
    theirs = {sample["__key__"]: {k: v for k, v in sample.items() if k[:2] != "__"} for sample in found}
    # It takes what a Mac leaves beside a file for a sample of its own.
    assert theirs.pop("a/") == {"_one.jpg": b"junk"}
    assert theirs == SAMPLES


def test_a_header_that_promises_more_than_the_tar_holds_is_not_believed(tmp_path: Path) -> None:
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 2**60
    (tmp_path / "t.tar").write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(UserError, match=r"t\.tar is truncated or damaged \(it ends in the middle of a member\)"):
        list(read_shard(tmp_path / "t.tar"))
    assert verify_shard(str(tmp_path / "t.tar")).problems == [
        "t.tar: truncated or damaged after 0 samples (it ends in the middle of a member)"
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.left.JPG", ("a", "left.jpg")),
        ("x.y/a.jpg", ("x.y/a", "jpg")),
        ("/etc/passwd.txt", ("/etc/passwd", "txt")),
        ("README", None),
        ("x/.hidden", None),
        ("", None),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_file_name(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected
