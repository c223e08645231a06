"""Sources: what is found at a path, which columns count, and what a person is told when it is not what it should be."""

import csv
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.shards.format import write_shard
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.rows import Row, Source
from pipelines.stages.pairs.sources.open import open_source
from tests.pipelines.stages.pairs.web_server import picture

ODD_CAPTIONS = [
    "a dog",
    "naïve  café\n",
    "猫\x00 cat",
    '"quoted", with\ttab',
    " ",
    "",
    "🐈‍⬛",
    "line\u2028separator\r\n",
]


def opened(source: Path | str, **options: Any) -> Source:
    return open_source(PairsConfig.model_validate({"source": str(source), **options}))


def rows_of(source: Path | str, **options: Any) -> list[Row]:
    found = opened(source, **options)
    return found.read(0, found.total)


def load(row: Row) -> bytes:
    assert row.load is not None
    return row.load(10**6)


def write_parquet(path: Path, row_group_size: int = 3, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def test_laion_parquet_is_read_in_any_ranges(tmp_path: Path) -> None:
    urls = [f"http://pictures.example/{i}.jpg" for i in range(8)]
    write_parquet(tmp_path / "part-0.parquet", URL=urls[:5], TEXT=ODD_CAPTIONS[:5], similarity=[0.3] * 5)
    write_parquet(tmp_path / "part-1.parquet", URL=urls[5:], TEXT=ODD_CAPTIONS[5:], similarity=[0.1] * 3)
    for place in (tmp_path, tmp_path / "part-*.parquet", f"file://{tmp_path}"):
        source = pickle.loads(pickle.dumps(opened(place)))
        assert (source.total, source.downloads) == (8, True)
        pieces = [row for start in range(0, 8, 3) for row in source.read(start, min(start + 3, 8))]
        assert [row.index for row in pieces] == list(range(8))
        assert [row.url for row in pieces] == urls
        assert [row.captions for row in pieces] == [(text,) if text.strip() else () for text in ODD_CAPTIONS]
        assert pieces[6].extra == {"similarity": 0.1}
    assert source.extra_types == {"similarity": pa.float64()}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_tables_of_picture_files_keep_captions_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "images").mkdir()
    names = [f"images/{i}.jpg" for i in range(len(ODD_CAPTIONS))]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(i))
    path = tmp_path / f"table.{suffix}"
    rows = [{"file": name, "name": text, "label": 3} for name, text in zip(names, ODD_CAPTIONS)]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    found = rows_of(path, columns={"image": "file", "text": "name"})
    assert [row.captions for row in found] == [(text,) if text.strip() else () for text in ODD_CAPTIONS]
    assert [load(row) for row in found] == [picture(i) for i in range(len(names))]
    assert found[2].extra == {"file": names[2], "label": "3" if suffix in ("csv", "tsv") else 3}


def test_a_list_of_captions_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"file_name": "a.jpg", "captions": ["one", "", None, "two\n"], "boxes": [{"x": 1.5}]}))
    (row,) = rows_of(path)
    assert row.captions == ("one", "two\n")
    assert row.extra["boxes"] == [{"x": 1.5}]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_an_imagefolder_is_read_through_its_metadata(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    content = '{"file_name": "a.jpg", "text": "hi"}' if name.endswith("jsonl") else "file_name,text\na.jpg,hi\n"
    (tmp_path / name).write_text(content)
    (row,) = rows_of(tmp_path)
    assert (row.captions, load(row)) == (("hi",), picture(1))


def test_pictures_inside_a_parquet_are_read(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "t.parquet", image=[{"bytes": picture(i), "path": "x"} for i in range(2)], text=["a", "b"], n=[1, 2]
    )
    found = rows_of(path)
    assert [load(row) for row in found] == [picture(0), picture(1)]
    assert found[1].extra == {"n": 2}
    plain = write_parquet(tmp_path / "u.parquet", jpg=[picture(4)], caption=["c"])
    assert load(rows_of(plain)[0]) == picture(4)


def test_a_folder_pairs_pictures_with_the_text_beside_them(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/c.PNG", "d.webp", "e.jpg", ".hidden/f.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "b.txt").write_bytes("\ufeffcafé\n".encode())
    (tmp_path / "a/c.txt").write_text("two\nlines")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.md").write_text("no picture")
    found = rows_of(tmp_path)
    assert [row.extra["file"] for row in found] == ["a/c.PNG", "b.jpg", "d.webp", "e.jpg"]
    assert [row.captions for row in found] == [("two\nlines",), ("café\n",), (), ()]
    assert [row.status for row in found] == [None, None, "unreadable_caption", None]


def test_img2dataset_output_is_read_as_it_is(tmp_path: Path) -> None:
    facts = {"caption": "x", "url": "http://a.example/1", "key": "000000000", "status": "success", "similarity": 0.4}
    write_shard(
        tmp_path / "00000.tar",
        [
            ("000000000", {"jpg": picture(0), "txt": "naïve\n".encode(), "json": json.dumps(facts).encode()}),
            ("000000001", {"png": picture(1), "json": json.dumps({"captions": ["p", "q"]}).encode()}),
        ],
    )
    write_shard(
        tmp_path / "00001.tar", [("000010000", {"webp": picture(2), "json": b'{"TEXT": "t"}'}), ("1", {"jpg": b""})]
    )
    write_parquet(tmp_path / "00000.parquet", url=["http://a.example/1"], caption=["x"])
    source = opened(tmp_path)
    found = [row for start in range(4) for row in source.read(start, start + 1)]
    assert [row.captions for row in found] == [("naïve\n",), ("p", "q"), ("t",), ()]
    assert [load(row) for row in found[:3]] == [picture(0), picture(1), picture(2)]
    assert found[0].url == "http://a.example/1"
    assert found[0].extra == {
        "tar_key": "000000000",
        "source_key": "000000000",
        "source_status": "success",
        "similarity": 0.4,
    }


def test_sources_on_any_store_are_read() -> None:
    with fsspec.open("memory://set/a.jsonl", "w") as file:
        file.write('{"file_name": "p/a.jpg", "text": "hi"}')
    with fsspec.open("memory://set/p/a.jpg", "wb") as file:
        file.write(picture(2))
    (row,) = rows_of("memory://set/a.jsonl")
    assert load(row) == picture(2)
    assert len(opened("memory://set/a.jsonl").digest()) == 64


def test_a_table_of_urls_stays_one_though_it_names_files(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", url=["http://a.example/1"], text=["a"], file_name=["gone.jpg"])
    assert opened(path).downloads
    path = write_parquet(tmp_path / "u.parquet", image=["http://a.example/1"], text=["a"])
    assert rows_of(path)[0].url == "http://a.example/1"


@pytest.mark.shared
def test_published_tables_are_understood(shared_data: Path) -> None:
    folder = shared_data / "url_metadata"
    laion = rows_of(folder / "img2dataset_test_10000.parquet")
    assert len(laion) == 10_000
    assert all(row.url and row.captions for row in laion)
    coyo = rows_of(folder / "coyo700m_readme_preview.jsonl")
    assert coyo[0].extra["source_width"] == 600
    assert len(rows_of(folder / "cc12m_10samples.tsv")) == 9


def test_moving_a_data_set_keeps_its_digest_and_changing_it_does_not(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "elsewhere"
    first.mkdir()
    (first / "a.jpg").write_bytes(picture(1))
    (first / "a.txt").write_text("hi")
    (first / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "hi"}')
    write_shard(first / "0.tar", [("0", {"jpg": picture(1), "txt": b"hi"})])
    write_parquet(first / "t.parquet", URL=["http://a.example"], TEXT=["a"])
    shutil.copytree(first, second)

    def digests(folder: Path) -> list[str]:
        kinds = [("", "folder"), ("", "table"), ("0.tar", "auto"), ("t.parquet", "auto")]
        return [opened(folder / name, format=kind).digest() for name, kind in kinds]

    before = digests(first)
    assert digests(second) == before
    assert len(set(before)) == 4
    (second / "a.jpg").write_bytes(picture(2))
    (second / "a.txt").write_text("ho")
    write_shard(second / "0.tar", [("0", {"jpg": picture(1), "txt": b"ho"})])
    write_parquet(second / "t.parquet", URL=["http://a.example"], TEXT=["b"])
    assert not set(digests(second)) & set(before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.parquet", None, r"no file, folder or match at .*none\.parquet: say `--set pairs\.source=PATH`"),
        ("damaged.parquet", b"PAR1" + bytes(100), r"damaged\.parquet is not a readable parquet file"),
        (
            "a.csv",
            b"url,words\nhttp://a,b\n",
            "no text column: it has url, words, .*say `--set pairs.columns.text=NAME`",
        ),
        ("b.csv", b"link,text\nhttp://a,b\n", "no url column: it has link, text, .*`--set pairs.columns.image=NAME`"),
        ("c.csv", b"url,text\nhttp://a,b,c\n", "line 2 has 3 fields where the first line has 2"),
        ("d.csv", "url,text\nhttp://a,caf\u00e9\n".encode("latin-1"), "is not UTF-8"),
        ("e.jsonl", b'{"url": 1}\n{"url"', "line 2 is not valid JSON"),
        ("f.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("g.tar", b"x" * 2000, r"g\.tar is truncated or not a tar"),
        ("h.zip", b"", r"h\.zip is no source of format auto"),
    ],
)
def test_unusable_sources_are_explained_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        rows_of(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", URL=["http://a"], TEXT=["a"])
    with pytest.raises(UserError, match=r"has no column 'name' \(pairs.columns.text\): it has URL, TEXT"):
        rows_of(path, columns={"text": "name"})


def test_folders_without_pictures_or_captions_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no pictures"):
        opened(tmp_path)
    (tmp_path / "a.jpg").write_bytes(picture())
    with pytest.raises(UserError, match=r"holds 1 pictures but no captions: put a \.txt beside each"):
        opened(tmp_path)


def test_pictures_without_captions_are_rows_where_captions_are_optional(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "t.parquet", URL=["http://a", "http://b"], label=["hat", "dress"])
    with pytest.raises(
        UserError, match=r"has no text column: .* or `--set pairs\.captions=optional` if none are needed"
    ):
        rows_of(table)
    rows = rows_of(table, captions="optional")
    assert [(row.captions, row.extra["label"]) for row in rows] == [((), "hat"), ((), "dress")]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture())
    (folder / "b.jpg").write_bytes(picture(1))
    (folder / "b.txt").write_text("a hat")
    assert [(row.captions, row.status) for row in rows_of(folder, captions="optional")] == [
        ((), None),
        (("a hat",), None),
    ]


def test_a_truncated_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [(f"{i}", {"jpg": picture(i)}) for i in range(3)])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="truncated"):
        rows_of(path)


def test_values_that_json_cannot_hold_are_made_plain(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"url": "http://a", "text": "x\\ud800y", "score": NaN, "big": 99999999999999999999, "k": "\\udfff"}'
    )
    (row,) = rows_of(path)
    assert row.captions == ("x\ufffdy",)
    assert row.extra == {"score": None, "big": 99999999999999999999, "k": "\ufffd"}
