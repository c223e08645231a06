"""Opening a source: brace patterns, and that nothing is learnt twice of files that do not change."""

import subprocess
import sys
from pathlib import Path

import pytest
from webdataset.shardlists import expand_urls

from pipelines.errors import UserError
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.inputs import count_rows, source_digests
from pipelines.stages.pairs.sources import fingerprint, text_tables
from pipelines.stages.pairs.sources import open as opening
from pipelines.stages.pairs.sources.open import open_source
from pipelines.store import storage
from tests.aged import aged
from tests.pipelines.stages.pairs.sources.test_sources import opened, rows_of
from tests.pipelines.store.s3 import BUCKET, S3


def write_table(path: Path, *texts: str, age_s: int = 10) -> Path:
    """Write a table of URLs that looks as if it had been written a while ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'{{"url": "http://a.example/{text}", "text": "{text}"}}\n' for text in texts))
    return aged(path, age_s)


def captions(pattern: Path | str) -> list[str]:
    return [row.captions[0] for row in rows_of(pattern)]


def test_a_brace_pattern_stands_for_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in range(12):
        write_table(tmp_path / f"{number:03d}.jsonl", f"text {number}")
    assert captions(tmp_path / "{002..010}.jsonl") == [f"text {i}" for i in range(2, 11)]
    assert captions(tmp_path / "{007,003}.jsonl") == ["text 3", "text 7"]
    assert captions(tmp_path / "{00[0-2],01?}.jsonl") == [f"text {i}" for i in (0, 1, 2, 10, 11)]
    assert opened(tmp_path / "{000..011}.jsonl").digest() == opened(tmp_path / "*.jsonl").digest()


@pytest.mark.parametrize("pattern", ["{000000..000012}.tar", "{8..11}.tar", "{a,b{c,d}}/{1..3}.tar", "plain.tar"])
def test_braces_mean_what_they_mean_to_webdataset(pattern: str) -> None:
    assert opening._expand(f"s3://bucket/{pattern}") == expand_urls(f"s3://bucket/{pattern}")


def test_a_file_whose_name_holds_braces_is_that_file(tmp_path: Path) -> None:
    write_table(tmp_path / "{1,2}.jsonl", "itself")
    write_table(tmp_path / "1.jsonl", "one")
    assert captions(tmp_path / "{1,2}.jsonl") == ["itself"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..2}.jsonl", r"stands for 3 files or patterns, of which 2 match nothing, the first being .*/0\.jsonl"),
        ("{7,8}*.jsonl", r"stands for 2 files or patterns, of which 2 match nothing, the first being .*/7\*\.jsonl"),
        ("{1,2.jsonl", r"has braces that do not match: close them, or say `--set pairs\.source=PATH`"),
        ("{0..10000000}.jsonl", r"stands for more than 1000000 files"),
    ],
)
def test_a_brace_pattern_without_its_files_is_one_line(tmp_path: Path, pattern: str, message: str) -> None:
    write_table(tmp_path / "1.jsonl", "one")
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path / pattern)
    assert "\n" not in str(caught.value)


def test_brace_patterns_work_in_buckets(s3: S3) -> None:
    for number in range(3):
        s3.client.put_object(Bucket=BUCKET, Key=f"braces/{number}.tsv", Body=b"text %d\thttp://a/1\n" % number)
    assert captions(f"s3://{BUCKET}/braces/{{0..1}}.tsv") == ["text 0", "text 1"]
    with pytest.raises(UserError, match=r"of which 1 match nothing, the first being s3://bucket/braces/3\.tsv"):
        opened(f"s3://{BUCKET}/braces/{{2..3}}.tsv")


def test_opening_a_source_imports_no_torch(tmp_path: Path) -> None:
    write_table(tmp_path / "1.jsonl", "one")
    program = (
        "import sys; from pipelines.stages.pairs.config import PairsConfig; "
        "from pipelines.stages.pairs.sources.open import open_source; "
        "source = open_source(PairsConfig(source=sys.argv[1])); "
        "sys.exit(source.total != 1 or 'torch' in sys.modules or 'webdataset' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "{1..1}.jsonl")], check=True, timeout=120)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed from here on."""
    names: list[str] = []

    def counted(file: object) -> str:
        names.append(Path(getattr(file, "name", "")).name)
        return storage.sha256_file(file)  # type: ignore[arg-type]

    monkeypatch.setattr(fingerprint, "sha256_file", counted)
    return names


def test_an_unchanged_table_is_hashed_and_indexed_once_a_process(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed: list[str] = []
    index = text_tables._index
    monkeypatch.setattr(
        text_tables, "_index", lambda location, reader: indexed.append(location.path) or index(location, reader)
    )
    for name in ("a", "b"):
        write_table(tmp_path / f"{name}.jsonl", name)
    config = PairsConfig(source=str(tmp_path / "*.jsonl"))
    first = source_digests(config)
    assert (count_rows(config), source_digests(config)) == (2, first)
    assert open_source(config).digest() == first["source"]
    assert (sorted(hashed), len(indexed)) == (["a.jsonl", "b.jsonl"], 2)
    write_table(tmp_path / "b.jsonl", "c")
    assert source_digests(config) != first
    # Small files are remembered together.
    assert sorted(hashed) == ["a.jsonl", "a.jsonl", "b.jsonl", "b.jsonl"]
