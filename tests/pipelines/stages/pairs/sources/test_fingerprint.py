"""A source is known by its contents: wherever it lies, however it got there, and whatever its files look like."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig

from pipelines.errors import UserError
from pipelines.shards.format import write_shard
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.inputs import source_digests
from pipelines.stages.pairs.sources import fingerprint, tables
from pipelines.store import remembered
from pipelines.store.location import Location
from tests.aged import aged, settled
from tests.pipelines.store.s3 import BUCKET, S3

MIB = 2**20


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read for their contents from here on."""
    names: list[str] = []
    sha256 = fingerprint._sha256

    def spy(file: Any) -> tuple[str | None, int]:
        digest, count = sha256(file)
        names.extend([file.place.path.rsplit("/", 1)[-1]] if count else [])
        return digest, count

    monkeypatch.setattr(fingerprint, "_sha256", spy)
    return names


def digest(source: Path | str, **options: Any) -> str:
    return source_digests(PairsConfig(source=str(source), **options))["source"]


def make_folder(folder: Path, *captions: str) -> Path:
    folder.mkdir()
    for number, caption in enumerate(captions):
        (folder / f"{number}.jpg").write_bytes(b"picture %d" % number)
        aged(folder / f"{number}.jpg").with_suffix(".txt").write_text(caption)
        aged(folder / f"{number}.txt")
    return folder


def upload(s3: S3, folder: Path, prefix: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            s3.client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
    return f"s3://{BUCKET}/{prefix}"


def table(path: Path, rows: int) -> Path:
    path.write_text("".join(f'{{"url": "http://a.example/{i}", "text": "{i:064}"}}\n' for i in range(rows)))
    return aged(path)


def test_a_table_has_one_digest_on_disk_and_in_buckets_however_it_was_uploaded(tmp_path: Path, s3: S3) -> None:
    local = table(tmp_path / "t.jsonl", 130_000)
    assert local.stat().st_size > 12 * MIB
    s3.client.put_object(Bucket=BUCKET, Key="one/single.jsonl", Body=local.read_bytes())
    for part_mib in (5, 6):
        transfer = TransferConfig(multipart_threshold=MIB, multipart_chunksize=part_mib * MIB)
        s3.client.upload_file(str(local), BUCKET, f"one/parts{part_mib}.jsonl", Config=transfer)
    names = [f"s3://{BUCKET}/one/{name}.jsonl" for name in ("single", "parts5", "parts6")]
    assert len({facts.version for facts in Location.of(f"s3://{BUCKET}/one").files_below().values()}) == 3
    assert {digest(name) for name in names} == {digest(local)}


def test_folders_and_tars_keep_their_digest_on_the_way_to_a_bucket_and_to_another_disk(tmp_path: Path, s3: S3) -> None:
    folder = make_folder(tmp_path / "set", "a dog", "a cat", "a bird")
    tars = tmp_path / "tars"
    tars.mkdir()
    write_shard(tars / "0.tar", [("0", {"jpg": b"x", "txt": b"y"})])
    for source, prefix in ((folder, "kept/set"), (tars, "kept/tars")):
        copy = shutil.copytree(source, tmp_path / "copies" / prefix)
        assert digest(source) == digest(copy) == digest(upload(s3, source, prefix))


def test_a_changed_file_of_the_same_name_size_and_time_never_passes(tmp_path: Path, read: list[str]) -> None:
    folder = make_folder(tmp_path / "set", "a dog", "a cat")
    before, status = digest(folder), (folder / "0.txt").stat()
    (folder / "0.txt").write_text("a cow")
    os.utime(folder / "0.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert settled(folder / "0.txt").stat().st_mtime_ns == status.st_mtime_ns
    assert digest(folder) != before
    (folder / "0.txt").write_text("a dog")
    assert digest(folder) == before


def test_a_file_written_over_and_over_within_a_tick_of_the_clock_is_read_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    folder = make_folder(tmp_path / "set", "000")
    # A tick that even a slow machine does not miss.
    monkeypatch.setattr(remembered, "_FRESH_S", 600)
    found = []
    for number in range(20):
        (folder / "0.txt").write_text(f"{number:03}")
        found += [digest(folder), digest(folder)]
    assert len(set(found)) == 20
    assert read.count("0.txt") == 40


def test_a_changed_object_of_the_same_name_and_size_never_passes(s3: S3) -> None:
    found = []
    for number in range(3):
        for name, body in (("a.jpg", b"picture"), ("a.txt", b"caption %d" % number)):
            s3.client.put_object(Bucket=BUCKET, Key=f"changed/{name}", Body=body)
        found.append(digest(f"s3://{BUCKET}/changed"))
    assert len(set(found)) == 3


def test_files_are_read_once_and_then_known_to_other_processes(tmp_path: Path, read: list[str]) -> None:
    folder = make_folder(tmp_path / "set", "a dog", "a cat")
    before = digest(folder)
    assert sorted(read) == ["0.jpg", "0.txt", "1.jpg", "1.txt"]
    program = (
        "import sys; from pipelines.stages.pairs.sources import fingerprint\n"
        "from pipelines.stages.pairs.config import PairsConfig\n"
        "from pipelines.stages.pairs.inputs import source_digests\n"
        "def refuse(file): raise SystemExit('it was read again')\n"
        "fingerprint._sha256 = refuse\n"
        "print(source_digests(PairsConfig(source=sys.argv[1]))['source'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == before


def test_objects_are_read_once_and_asked_for_by_one_listing(
    tmp_path: Path, s3: S3, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(s3, make_folder(tmp_path / "set", *(f"caption {i}" for i in range(20))), "listed/set")
    (tmp_path / "set" / "3.txt").unlink()
    s3.client.delete_object(Bucket=BUCKET, Key="listed/set/3.txt")
    asked: list[str] = []
    facts = Location.facts
    monkeypatch.setattr(Location, "facts", lambda self, **options: asked.append(self.url) or facts(self, **options))
    before = digest(url)
    assert len(read) == 39
    assert digest(url) == before == digest(tmp_path / "set")
    assert len([name for name in read if name.endswith(".jpg")]) == 40
    assert [each for each in asked if each.startswith("s3://")] == []


def test_a_table_with_many_pictures_beside_it_lists_them(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    (folder / "p").mkdir(parents=True)
    for i in range(6):
        (folder / "p" / f"{i}.jpg").write_bytes(b"%d" % i)
    names = [*(f"p/{i}.jpg" for i in range(6)), "p/none.jpg", "../outside.jpg"]
    (tmp_path / "outside.jpg").write_bytes(b"outside")
    (folder / "t.jsonl").write_text("".join(f'{{"image": "{name}", "text": "x"}}\n' for name in names))
    url = upload(s3, tmp_path, "beside")
    asked: list[str] = []
    facts = Location.facts
    monkeypatch.setattr(Location, "facts", lambda self, **options: asked.append(self.path) or facts(self, **options))
    monkeypatch.setattr(tables, "_MOST_REQUESTS", 5)
    assert digest(f"{url}/set/t.jsonl") == digest(folder / "t.jsonl")
    assert [path for path in asked if path.endswith(".jpg")] == [f"{BUCKET}/beside/outside.jpg"]


def test_the_checksum_of_a_store_spares_reading_only_if_it_is_of_the_whole_object(
    tmp_path: Path, s3: S3, read: list[str]
) -> None:
    local = table(tmp_path / "t.jsonl", 80_000)
    data = local.read_bytes()
    s3.client.put_object(Bucket=BUCKET, Key="sums/whole.jsonl", Body=data, ChecksumAlgorithm="SHA256")
    transfer = TransferConfig(multipart_threshold=MIB, multipart_chunksize=5 * MIB)
    extra = {"ChecksumAlgorithm": "SHA256"}
    s3.client.upload_file(str(local), BUCKET, "sums/parts.jsonl", Config=transfer, ExtraArgs=extra)
    whole = digest(f"s3://{BUCKET}/sums/whole.jsonl")
    assert read == []
    assert digest(f"s3://{BUCKET}/sums/parts.jsonl") == whole == digest(local)
    assert read == ["parts.jsonl", "t.jsonl"]


def test_one_changed_file_of_many_has_only_its_neighbours_read_again(tmp_path: Path, read: list[str]) -> None:
    folder = make_folder(tmp_path / "set", *(f"caption {i:04}" for i in range(5)))
    for name in ("2.jpg", "3.jpg"):
        (folder / name).write_bytes(bytes(fingerprint._GROUP_BYTES))
        aged(folder / name)
    before = digest(folder)
    assert len(read) == 10
    read.clear()
    (folder / "4.txt").write_text("caption 0005")
    assert digest(folder) != before
    assert set(read) == {"3.txt", "4.jpg", "4.txt"}


def sums(folder: Path, *lines: str) -> Path:
    (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines))
    return folder / "SHA256SUMS"


def test_recorded_digests_are_believed_only_if_the_recipe_says_so(tmp_path: Path, read: list[str]) -> None:
    folder = make_folder(tmp_path / "set", "a dog", "a cat")
    files = sorted(path.name for path in folder.iterdir())
    output = subprocess.run(["sha256sum", "--", *files], cwd=folder, check=True, capture_output=True, text=True)
    sums(folder, *output.stdout.splitlines())
    recorded = digest(folder, identify_by="recorded")
    assert read == []
    # Nor is what was believed taken for known.
    assert digest(folder) == recorded
    assert sorted(read) == files
    # A record that is wrong passes where it is believed, and only there.
    sums(folder, *(f"{'0' * 64}  ./{name}" for name in files))
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "SHA256SUMS")
    assert digest(tmp_path / "copy", identify_by="recorded") != recorded
    assert digest(tmp_path / "copy") == recorded


def test_a_file_newer_than_its_record_is_read(tmp_path: Path, read: list[str]) -> None:
    folder = make_folder(tmp_path / "set", "a dog", "a cat")
    aged(sums(folder, *(f"{'0' * 64}  {path.name}" for path in folder.iterdir())), 5)
    (folder / "1.txt").write_text("a cow")
    digest(folder, identify_by="recorded")
    assert read == ["1.txt"]


def test_a_listing_reads_nothing_and_tells_every_change(tmp_path: Path, s3: S3, read: list[str]) -> None:
    folder = make_folder(tmp_path / "set", "a dog")
    url = upload(s3, folder, "by-listing")

    def by_listing(source: Path | str) -> str:
        return digest(source, identify_by="listing")

    here, there = by_listing(folder), by_listing(url)
    assert (by_listing(folder), by_listing(url)) == (here, there)
    assert len({here, there, by_listing(shutil.copytree(folder, tmp_path / "copy"))}) == 3
    status = (folder / "0.txt").stat()
    (folder / "0.txt").write_text("a cat")
    os.utime(folder / "0.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    s3.client.put_object(Bucket=BUCKET, Key="by-listing/0.txt", Body=b"a cat")
    assert here != by_listing(folder)
    assert there != by_listing(url)
    assert read == []
    assert digest(folder) == digest(url) != here


def test_a_listing_needs_a_store_that_tells_versions() -> None:
    for name in ("a.jpg", "a.txt"):
        location = Location.of(f"memory://versions/{name}")
        location.filesystem.pipe_file(location.path, b"x")
    with pytest.raises(UserError, match=r"a\.jpg: its store has no versions .* set pairs\.identify_by=contents"):
        digest("memory://versions", identify_by="listing")


def test_contents_that_nothing_tells_the_change_of_are_read_every_time(read: list[str]) -> None:
    for name in ("a.jpg", "a.txt"):
        location = Location.of(f"memory://unversioned/{name}")
        location.filesystem.pipe_file(location.path, b"x")
    before = digest("memory://unversioned")
    location.filesystem.pipe_file(location.path, b"y")
    assert digest("memory://unversioned") != before
    assert len(read) == 4


def test_a_reading_that_takes_long_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fingerprint, "_SAY_AFTER_S", -1)
    folder = make_folder(tmp_path / "set", "a dog", "a cat")
    monkeypatch.setattr(fingerprint, "_GROUP_BYTES", 1)
    digest(folder)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"reading {folder} once" in said
    assert "pairs.identify_by=listing" in said
    digest(folder)
    assert capsys.readouterr().err == ""


def test_what_was_read_before_an_interruption_is_not_read_again(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "set", *"abcdef")
    monkeypatch.setattr(fingerprint, "_GROUP_BYTES", 1)
    monkeypatch.setattr(fingerprint, "_LOCAL_THREADS", 1)
    add: Callable[..., None] = fingerprint.KnownDigests.add
    count = iter(range(100))

    def interrupted(self: Any, key: str, value: str) -> None:
        if next(count) == 5:
            raise KeyboardInterrupt
        add(self, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(fingerprint.KnownDigests, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            digest(folder)
    read.clear()
    digest(folder)
    assert len(read) == 12 - 5
