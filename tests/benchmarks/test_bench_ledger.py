"""The benchmark of the ledger works on what the ledger writes, and says what it measured. Speed is asserted nowhere."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.run.plan import plan
from pipelines.store.commits import COMMITS, SEGMENTS, ArtifactWriter
from pipelines.store.location import Location
from pipelines.store.storage import Storage
from tests.benchmarks import bench_ledger
from tests.benchmarks.bare_listing import Numbered, list_objects
from tests.benchmarks.ledger_state import Layout, add_files, add_records, finish, write_segments
from tests.benchmarks.ledger_work import recipe_of
from tests.s3 import BUCKET, FastS3, fast_s3

LAYOUT = Layout(shard=(("", ".tar", 3, 50), ("stats/", ".json", 0, 7)), others=(("vocab.txt", 4),))


@pytest.fixture
def server(use_s3: Callable[[str], None]) -> Iterator[FastS3]:
    with fast_s3() as running:
        use_s3(running.url)
        yield running


def contents(storage: Storage) -> dict[str, bytes]:
    paths = Location.of(storage.url).files_below()
    names = [path.removeprefix(storage.path("")).lstrip("/") for path in paths]
    return {name: storage.read_bytes(name) for name in names}


def test_artifacts_are_as_the_ledger_writes_them(server: FastS3, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"image": "a.png", "text": "a picture"}\n')
    planned = plan(recipe_of(f"s3://{BUCKET}/root", str(source)))[0]
    ours, real = Storage(f"s3://{BUCKET}/ours"), Storage(f"s3://{BUCKET}/real")
    add_files(server, ours, LAYOUT.records(3))
    add_records(server, ours, LAYOUT.records(3))
    writer = ArtifactWriter("pairs", planned.key, real)
    for record in LAYOUT.records(3):
        real.write_bytes(record.name, bytes(record.bytes))
        writer.commit(record.name, rows=record.rows, sha256=record.sha256, content=record.content)
    assert contents(ours) == contents(real)
    (ours / COMMITS).remove()
    artifact = finish(planned, ours, LAYOUT.records(3))
    writer.finish(**artifact.manifest.model_dump(include=set(inspect.signature(writer.finish).parameters)))
    assert contents(ours) == contents(real)
    artifact.check_sizes()


def test_segments_are_those_of_a_run_that_was_killed(server: FastS3) -> None:
    storage = Storage(f"s3://{BUCKET}/root")
    add_files(server, storage, LAYOUT.records(2600))
    add_records(server, storage, LAYOUT.records(2600))
    for _ in range(2):
        write_segments(ArtifactWriter("latents", "key", storage), LAYOUT.records(2600))
        assert len((storage / SEGMENTS).names()) == 2
        server.take_figures()
        table = ArtifactWriter("latents", "key", storage).committed()
        # Two segments, and the records after the last one; they are gathered now.
        assert server.take_figures().requests["GetObject"] == 2 + 5201 - 4000
        assert list(table) == sorted(LAYOUT.records(2600), key=lambda record: record.name)
        assert len((storage / SEGMENTS).names()) == 3


def test_a_bare_listing_finds_every_object_in_full_pages(server: FastS3) -> None:
    names = [f"{i:06d}{ending}" for i in range(2600) for ending in (".tar", ".parquet")]
    names += [f"stats/{i:06d}.json" for i in range(2600)] + ["manifest.json", "vocab.txt"]
    server.add_objects((f"root/{name}", 10) for name in names)
    server.add_objects([("root2", 10), ("other/000000.tar", 10)])
    server.take_figures()
    listed = list_objects(server.url, BUCKET, "root/", [Numbered("", 2600, 2), Numbered("stats/", 2600, 1)])
    assert listed.objects == len(names)
    assert listed.requests == 6 + 3 + 1
    assert server.take_figures().requests["ListObjectsV2"] == listed.requests


def test_ratios_are_medians_over_rounds_and_growth_is_against_ten_thousand() -> None:
    def figures(shards: int, scale: float) -> bench_ledger.Figures:
        seconds = {"listing_finished": 1.0, "listing_half": 0.5, "plan": 0.5, "ls": 0.1, "check": 2.0, "resume": 1.0}
        runs = {work: [{"seconds": scale * value}] * 3 for work, value in seconds.items()}
        runs["plan"] = [{"seconds": scale * value} for value in (0.5, 99.0, 0.4)]
        return bench_ledger.Figures(
            shards, runs | {"driver": [{"peak_mib": 512.0}] * 3, "actor": [{"peak_mib": 256.0}] * 3}
        )

    sizes = [figures(1_000, 50.0), figures(10_000, 1.0), figures(400_000, 44.0)]
    found = bench_ledger.ratios(sizes)
    assert found == pytest.approx(
        {
            "plan_vs_listing": 0.5,
            "ls_vs_listing": 0.1,
            "check_vs_listing": 2.0,
            "resume_vs_listing": 2.0,
            "driver_gib": 0.5,
            "actor_gib": 0.25,
            "growth": 1.1,
        }
    )
    sizes[-1].runs["resume"] = [{"over_s": 600.0, "requests": 9}, {}, {}]
    found = bench_ledger.ratios(sizes)
    assert (found["resume_vs_listing"], found["growth"], found["check_vs_listing"]) == (None, None, 2.0)


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str], use_s3: Callable[[str], None]) -> None:
    bench_ledger.main(["--sizes", "100", "--rounds", "1", "--delay-ms", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (size,) = result["sizes"]
    assert all(value > 0 for value in result["ratios"].values())
    assert size["plan"]["rows"] == 1_000_000
    assert size["ls"]["artifacts"] == 4
    assert (size["check"]["files"], size["resume"]["files"]) == (200, 151)
    assert size["driver"]["pending"] == 50
    assert size["driver"]["peak_mib"] > size["actor"]["peak_mib"] > 10
    assert size["listing_finished"]["objects"] > 200
    assert size["listing_half"]["objects"] > 100


def test_work_that_takes_too_long_is_given_up_for_good(
    capsys: pytest.CaptureFixture[str], use_s3: Callable[[str], None]
) -> None:
    bench_ledger.main(["--sizes", "3,5", "--rounds", "2", "--delay-ms", "1", "--limit-s", "0.01"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["3", work] for work in ("listing_finished", "listing_half", "plan", "ls", "check", "resume", "driver")
    ]
    assert set(json.loads(last)["ratios"].values()) == {None}
