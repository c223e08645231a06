"""Shards made to do harm: whoever reads or verifies one refuses the same, in memory that they do not decide on."""

import io
import json
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import UserError
from pipelines.inspection.verify import verify_shard
from pipelines.shards import samples as rules
from pipelines.shards.format import decode_json, decode_npy, encode_npy, read_shard, write_shard
from pipelines.shards.reader import ShardReader
from pipelines.shards.tar_index import index_tar, samples_of
from pipelines.shards.tar_windows import Tar, random_samples
from pipelines.stages.pairs.artifact import decode_image
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.storage import Storage

MIB = 2**20
END = bytes(2 * tarfile.BLOCKSIZE)


def member(name: str, data: bytes = b"", **facts: object) -> bytes:
    """Return a member's header and bytes; `facts` replace what the header says."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def extended(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return member("header", records, type=kind)


def record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def sparse_of_64_gib() -> bytes:
    """Return a GNU sparse member of one block that claims to be 64 GiB long."""
    header = bytearray(member("b.txt", type=tarfile.GNUTYPE_SPARSE)[: tarfile.BLOCKSIZE])
    header[124:136] = b"%011o\0" % 512
    header[483:495] = b"\x80" + (2**36).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


SOUND = member("a.txt", b"sound")
# What stands behind a sound sample, and what every strict reader says of it.
HOSTILE = {
    "sparse": (sparse_of_64_gib(), "b.txt is a sparse file"),
    "sparse by pax": (
        extended(record("GNU.sparse.realsize", str(2**40)) + record("GNU.sparse.name", "b.txt")) + member("x", b"1"),
        "b.txt is a sparse file",
    ),
    "claim beyond the file": (member("b.txt", size=2**50), "it ends in the middle of a member"),
    "pax claim beyond the file": (
        extended(record("size", str(2**60))) + member("b.txt", b"1"),
        "it ends in the middle of a member",
    ),
    "pax size that is no number": (extended(record("size", "-1")) + member("b.txt", b"1"), "damaged pax header"),
    "global size": (
        extended(record("size", "0"), tarfile.XGLTYPE) + member("b.txt", b"1"),
        "a global header that renames or resizes every member",
    ),
    "huge pax header": (
        extended(record("comment", "x" * 2 * MIB)) + member("b.txt"),
        "a name or pax header of 2097169 bytes",
    ),
    "huge name": (
        member("././@LongLink", b"n" * 2 * MIB, type=tarfile.GNUTYPE_LONGNAME) + member("b.txt"),
        "a name or pax header of 2097152 bytes",
    ),
    "symbolic link": (member("b.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "b.txt is a link"),
    "hard link": (member("b.txt", type=tarfile.LNKTYPE, linkname="a.txt"), "b.txt is a link"),
    "link of no sample": (member("README", type=tarfile.SYMTYPE, linkname="a.txt"), "README is a link"),
    "device": (member("b.txt", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "b.txt is a device"),
    "block device": (member("b.txt", type=tarfile.BLKTYPE), "b.txt is a device"),
    "pipe": (member("b.txt", type=tarfile.FIFOTYPE), "b.txt is a pipe"),
    "unknown": (member("b.txt", type=b"V"), "b.txt is a member of an unknown kind"),
    "file twice": (member("a.txt", b"again"), "a second sample a"),
    "file twice but for case": (member("a.TXT", b"again"), "a second sample a"),
    "key in two places": (member("b.txt") + member("a.json", b"{}"), "a second sample a"),
    "text too long": (member("b.txt", bytes(1001)), "b.txt is a text of 1001 bytes, more than 1000"),
    "json too long": (member("b.left.json", bytes(1001)), "b.left.json is a text of 1001 bytes, more than 1000"),
    "sample too large": (
        member("b.bin", bytes(3000)) + member("b.dat", bytes(3000)),
        "the sample b has 6000 bytes, more than 5000",
    ),
    "too many files": (b"".join(member(f"b.{i}") for i in range(11)), "more than 10 files of the sample b"),
    "too many samples": (b"".join(member(f"{i}.txt") for i in range(100)), "more than 50 samples"),
    "too many extensions": (
        b"".join(member(f"{i}.e{i}") for i in range(21)),
        "files of more than 20 extensions",
    ),
    "name that moves the cursor": (
        member("\x1b[2J\n\u202e.txt", type=tarfile.SYMTYPE),
        "\ufffd[2J\ufffd\ufffd.txt is a link",
    ),
    "name that is no text": (extended(b"13 path=\xff\xfe.b\n") + member("x", type=b"2"), "\ufffd\ufffd.b is a link"),
}


@pytest.fixture(params=list(HOSTILE), ids=str)
def hostile(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A tar, and what is wrong with it."""
    for name, bound in (
        ("MOST_TEXT_BYTES", 1000),
        ("MOST_SAMPLE_BYTES", 5000),
        ("MOST_FILES", 10),
        ("MOST_SAMPLES", 50),
        ("MOST_EXTENSIONS", 20),
    ):
        monkeypatch.setattr(rules, name, bound)
    data, problem = HOSTILE[request.param]
    (tmp_path / "t.tar").write_bytes(SOUND + data + END)
    return tmp_path / "t.tar", problem


def refused_by(reader: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        reader()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loaders_and_verify_refuse_the_same(hostile: tuple[Path, str]) -> None:
    path, problem = hostile
    storage, size = Storage(str(path.parent)), path.stat().st_size
    reader = ShardReader(storage, FileTable.of([FileRecord(name=path.name, rows=2, bytes=size, sha256="00" * 32)]))
    tracemalloc.start()
    try:
        assert problem in refused_by(lambda: list(read_shard(path)))
        assert problem in refused_by(lambda: reader.read(0, 0))
        (line,) = verify_shard(str(path)).problems
        assert problem in line
        # Names are printed, and tars end up in terminals.
        assert line.isprintable()
        random_samples([Tar(storage, path.name, size)], 5)
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    finally:
        tracemalloc.stop()


def test_in_a_source_they_cost_their_row_or_end_the_run_on_one_line(hostile: tuple[Path, str]) -> None:
    path, problem = hostile
    damaged = ("ends in the middle", "pax header", "global header", "too many files", "more than 10 files")
    if any(words in problem for words in damaged):
        assert "t.tar is truncated or not a tar" in refused_by(lambda: index_tar(str(path)))
        return
    index = index_tar(str(path))
    found = {sample.key: sample.files for sample in samples_of(str(path), index, 0, index.rows)}
    assert "a" in found
    if problem.startswith("b.txt is a") and "text" not in problem:
        # Not a missing sample: a row with a status.
        assert found["b"]["txt"][1] is None


def test_names_are_keys_and_never_paths(tmp_path: Path) -> None:
    names = ["/etc/passwd.txt", "../../up.txt", "a/../../b.txt", "C:\\x.txt"]
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "t.tar").write_bytes(b"".join(member(name, b"x") for name in names) + END)
    assert [sample["__key__"] for sample in read_shard(folder / "t.tar")] == [n.removesuffix(".txt") for n in names]
    assert verify_shard(str(folder / "t.tar")).ok
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "t.tar"]


def test_verify_goes_on_behind_what_it_refuses(tmp_path: Path) -> None:
    parts = [data for name, (data, _) in HOSTILE.items() if name in ("sparse", "symbolic link", "file twice", "pipe")]
    (tmp_path / "t.tar").write_bytes(SOUND + b"".join(parts) + member("c.json", b"{") + member("d.txt") + END)
    report = verify_shard(str(tmp_path / "t.tar"))
    assert report.rows == 3
    assert [problem.split(" (")[0] for problem in report.problems] == [
        "t.tar: b.txt is a sparse file",
        "t.tar: b.txt is a link",
        "t.tar: b.txt is a pipe",
        "t.tar: a second sample a",
        "t.tar: c.json is unreadable",
    ]


def png_claiming(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(10 * MIB), 9)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png_with_text(size: int) -> bytes:
    data = b"Comment\0\0" + zlib.compress(bytes(size), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    whole = buffer.getvalue()
    return whole[:33] + chunk + whole[33:]


def npy_claiming(shape: str) -> bytes:
    return encode_npy(np.zeros(3, np.float32)).replace(b"(3,), ", f"({shape})".encode(), 1)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


UNREADABLE = {
    "png of 3.6 gigapixels": ("png", png_claiming(60_000)),
    "png just above the bound": ("png", png_claiming(10_001)),
    "png with a text bomb": ("png", png_with_text(200 * MIB)),
    "jpeg that breaks off": ("jpg", encoded("JPEG")[:1500]),
    "webp that breaks off": ("webp", encoded("WEBP")[:500]),
    "gif": ("png", encoded("GIF")),
    "array of a million million": ("npy", npy_claiming("1000000000000,")),
    "array of many dimensions": ("npy", npy_claiming("99999, 99999, 99999")),
    "array that is cut": ("npy", encode_npy(np.zeros(1000))[:-8]),
    "array with more behind it": ("npy", encode_npy(np.zeros(4)) + b"12345678"),
    "array of objects": ("npy", pickled()),
    "zip of arrays": ("npy", b"PK\x03\x04" + bytes(100)),
    "json of many lists": ("json", b"[" + b"[]," * 2_000_000 + b"0]"),
    "deep json": ("json", b"[" * 500_000),
    "text that is none": ("txt", b"\xff"),
}
DECODERS: dict[str, Callable[[bytes], object]] = {
    **dict.fromkeys(("png", "jpg", "webp"), decode_image),
    "npy": decode_npy,
    "json": decode_json,
    "txt": bytes.decode,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_verify_finds_unreadable_what_the_loaders_cannot_decode(tmp_path: Path, name: str) -> None:
    extension, data = UNREADABLE[name]
    write_shard(tmp_path / "t.tar", [("0", {extension: data}), ("1", {"json": json.dumps({"x": [1]}).encode()})])
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            (problem,) = verify_shard(str(tmp_path / "t.tar")).problems
            with pytest.raises((ValueError, OSError, RecursionError, Image.DecompressionBombError)):
                DECODERS[extension](data)
            assert tracemalloc.get_traced_memory()[1] < 100 * MIB
        finally:
            tracemalloc.stop()
    assert problem.startswith(f"t.tar: 0.{extension} is unreadable (")


@pytest.fixture
def fresh_python() -> Callable[..., str]:
    def run(program: str, *arguments: str) -> str:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout

    return run


MEMORY = """
import resource, sys
from pipelines.inspection.verify import verify_shard
from pipelines.stages.pairs.artifact import decode_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    assert not verify_shard(path).ok, path
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.shared
def test_the_worst_pictures_that_are_known_are_lines_of_a_report(
    shared_data: Path, tmp_path: Path, fresh_python: Callable[..., str]
) -> None:
    files = [path for path in sorted((shared_data / "hostile").rglob("*")) if path.is_file()]
    pictures = [path for path in files if path.suffix not in (".md", ".json", ".jsonl", ".txt")]
    samples = [(f"{i}", {"jpg": path.read_bytes()}) for i, path in enumerate(pictures)]
    assert len(samples) > 100
    write_shard(tmp_path / "t.tar", samples)
    assert int(fresh_python(MEMORY, str(tmp_path / "t.tar"))) < 500


def test_a_process_that_verifies_all_of_them_stays_small(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    paths = []
    for number, (extension, data) in enumerate(UNREADABLE.values()):
        write_shard(tmp_path / f"c{number}.tar", [("0", {extension: data})])
        paths.append(tmp_path / f"c{number}.tar")
    for number, (data, problem) in enumerate(HOSTILE.values()):
        # Those whose bounds are those of the other tests are sound here.
        if "more than" not in problem:
            (tmp_path / f"h{number}.tar").write_bytes(SOUND + data + END)
            paths.append(tmp_path / f"h{number}.tar")
    # A text of a gibibyte takes no room on disk, as long as nobody reads it.
    header = member("b.txt", size=2**30)
    with open(tmp_path / "long.tar", "wb") as file:
        file.write(SOUND + header)
        file.seek(2**30, io.SEEK_CUR)
        file.write(END)
    paths.append(tmp_path / "long.tar")
    assert int(fresh_python(MEMORY, *map(str, paths))) < 150
