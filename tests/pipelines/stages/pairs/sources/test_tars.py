"""Tars that anybody wrote: what is in them, and that the worst of them ends in one line."""

import io
import random
import tarfile
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.shards import tar_index
from pipelines.stages.pairs.rows import RejectedError
from pipelines.stages.pairs.sources import tars
from tests.pipelines.stages.pairs.sources.test_sources import load, opened, rows_of
from tests.pipelines.stages.pairs.web_server import picture


def tar_of(files: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_are_only_names(tmp_path: Path, kind: int) -> None:
    names = ["/etc/passwd", "../../up", "a/b/c", "é" * 150, "long/" * 60 + "x", "n" * 70_000]
    path = tmp_path / "t.tar"
    path.write_bytes(tar_of([(f"{n}.{e}", d) for n in names for e, d in (("JPG", picture(1)), ("txt", b"hi"))], kind))
    found = rows_of(path)
    assert [row.extra["tar_key"] for row in found[:5]] == names[:5]
    assert [row.captions for row in found[:5]] == [("hi",)] * 5
    assert all(load(row) == picture(1) for row in found[:5])


def test_any_range_of_samples_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "_STEP_ROWS", 3)
    for number in range(3):
        files = [(f"{number}{i}.{e}", d) for i in range(8) for e, d in (("jpg", bytes([i]) * 9000), ("txt", b"%d" % i))]
        (tmp_path / f"{number}.tar").write_bytes(tar_of(files))
    source = opened(tmp_path)
    for start in range(24):
        for stop in range(start, 25):
            found = source.read(start, stop)
            assert [row.captions for row in found] == [(str(i % 8),) for i in range(start, stop)]
            assert all(load(row) == bytes([row.index % 8]) * 9000 for row in found)


def test_a_sample_may_have_more_files_than_one_pair(tmp_path: Path) -> None:
    files = [("a.left.jpg", b"L"), ("a.mask.png", b"M"), ("a.txt", b"one"), ("._a.jpg", b"junk"), ("README", b"r")]
    files += [("b.jpg", b"1"), ("b.txt", b"x"), ("b.jpg", b"2"), ("b.txt", b"y")]
    (tmp_path / "t.tar").write_bytes(tar_of(files))
    found = rows_of(tmp_path / "t.tar")
    assert [(load(row), row.captions) for row in found] == [(b"L", ("one",)), (b"1", ("x",)), (b"2", ("y",))]


def test_what_cannot_be_read_of_a_sample_is_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_TEXT_BYTES", 100)
    sparse = bytearray(tar_of([("c.jpg", b"x" * 600)])[:1536])
    sparse[156:157] = b"S"
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse[:512])
    files = [("a.jpg", b"x"), ("a.txt", b"y" * 101), ("b.jpg", b"x"), ("b.txt", b"\xff")]
    (tmp_path / "t.tar").write_bytes(sparse + tar_of(files))
    found = rows_of(tmp_path / "t.tar")
    assert [row.status for row in found] == [None, "caption_too_long", "unreadable_caption"]
    with pytest.raises(RejectedError, match="unreadable_file"):
        load(found[0])


def test_damaged_tars_end_in_one_line_or_in_rows(tmp_path: Path) -> None:
    chance = random.Random(0)
    whole = tar_of([(f"{'n' * 150}{i}.{e}", b"12345") for i in range(3) for e in ("jpg", "txt")])
    messages = []
    for turn in range(300):
        data = bytearray(whole[: chance.randrange(len(whole))] if turn % 3 == 0 else whole)
        if len(data) >= 512:
            header = 512 * chance.randrange(len(data) // 512)
            for place in chance.choices([0, 124, 135, 156, 257, 345, 482, 511], k=2):
                data[header + place] = chance.choice(b"019xgLS\x00\x80\xff- ")
            data[header + 148 : header + 156] = b" " * 8
            data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
        (tmp_path / "t.tar").write_bytes(data)
        try:
            found = [row.index for row in rows_of(tmp_path / "t.tar")]
            assert found == list(range(len(found)))
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize(
    "record", [b"x" * 30, b"0 path=a\n", b"-3 path=a\n", b"99999 path=a\n", b"9999999999999999999999 a=b\n"]
)
def test_a_damaged_pax_header_does_not_hold_up_the_reader(tmp_path: Path, record: bytes) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, len(record)
    (tmp_path / "t.tar").write_bytes(member.tobuf() + record.ljust(512, b"\0") + tar_of([("a.jpg", b"x")]))
    with pytest.raises(UserError, match=r"truncated or not a tar .damaged pax header"):
        rows_of(tmp_path / "t.tar")
