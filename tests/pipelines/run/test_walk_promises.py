"""What the walk promises however long it takes: it reads a source once, and stops when its root is another driver's."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.run.plan import Selection
from pipelines.run.recipe import Recipe
from pipelines.run.runs import all_runs
from pipelines.run.walk import run
from pipelines.stage import Stage, StageContext
from pipelines.stages.diffusion.config import SamplingConfig
from pipelines.stages.evaluate.config import EvaluateConfig
from pipelines.stages.evaluate.stage import STAGE as EVALUATE
from pipelines.stages.latents.stage import STAGE as LATENTS
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.stage import STAGE as PAIRS
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from pipelines.tracking import null_stage_tracker
from tests.aged import aged
from tests.in_this_process import in_this_process
from tests.pipelines.store.held_root import TAKEN_OVER, HeldRoot, held_root
from tests.tiny import tiny_recipe, write_pictures
from tests.tiny_artifacts import diffusion_artifact, first_stage_artifact, latents_config, pairs_artifact

PADDING_ROWS = 64
# Enough for workers to be at for longer than a slow machine takes to tell them that the root is lost.
ITEMS = 200


def bytes_read() -> int:
    """Return how much this process has read so far, from any file in any way, as the kernel counts it."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def write_padded_table(folder: Path) -> Path:
    """Write a parquet table of 64 MiB, nearly all of it in a column that no stage looks at."""
    listed = write_pictures(folder / "pictures", 16)
    rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    schema = pa.schema([("file", pa.string()), ("captions", pa.list_(pa.string())), ("padding", pa.binary())])
    random = np.random.default_rng(0)
    table = listed.with_name("table.parquet")
    with pq.ParquetWriter(table, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        # Readers look at the first hundred rows.
        writer.write_table(pa.Table.from_pylist(rows * 8, schema))
        for _ in range(PADDING_ROWS):
            writer.write_table(pa.Table.from_pylist([{"padding": random.bytes(1 << 20)}], schema))
    return aged(table)


def test_a_run_reads_a_local_table_once_to_know_it(ray_cluster: None, tmp_path: Path) -> None:
    table = write_padded_table(tmp_path)
    values = tiny_recipe(table, tracking={"enabled": False}, root=str(tmp_path / "root"))
    recipe = Recipe.model_validate({**values, "pairs": values["pairs"] | {"rows_per_shard": 64}})
    size = table.stat().st_size
    before = bytes_read()
    result = run(recipe, Selection(only="pairs"))
    times = (bytes_read() - before) / size
    assert result.rows[0].state == "run"
    assert 1 <= times < 2, f"what the driver read is {times:.2f} times the table"
    # The rate in the stage table is of the rows worked on, of which the padding gives no sample.
    assert (result.rows[0].worked, result.rows[0].unit) == (16 * 8 + PADDING_ROWS, "rows")
    assert result.rows[0].rows < result.rows[0].worked

    before = bytes_read()
    assert run(recipe, Selection(only="pairs")).rows[0].state == "cached"
    # The same process remembers the digest of a file that has not changed since.
    assert bytes_read() - before < size / 2


def test_a_run_that_failed_names_what_it_can_go_on_with(ray_cluster: None, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text('{"file": "missing.png", "captions": ["a picture"]}\n', encoding="utf-8")
    values = tiny_recipe(table, tracking={"enabled": False}, root=str(tmp_path / "root"))
    with pytest.raises(UserError, match="gave a sample"):
        run(Recipe.model_validate(values), Selection(only="pairs"))
    root = Storage(str(tmp_path / "root"))
    (failed,) = all_runs(root)
    assert [(each.name, each.reference) for each in failed.state.stages] == [("pairs", None)]
    assert failed.state.stages[0].key in (root / "pairs").names()


@pytest.fixture
def root() -> Iterator[HeldRoot]:
    with held_root() as root:
        yield root


def take_over_when(is_time: Callable[[int, int], bool], root: HeldRoot) -> Callable[..., None]:
    """Return a progress display under which the root is taken over when a stage has come so far."""

    def progress(done: int, total: int, **facts: str) -> None:
        if is_time(done, total) and not root.lost:
            root.lose()

    return progress


def run_until_taken_over(
    stage: Stage,
    config: Config,
    folder: Path,
    upstream: Mapping[str, Artifact],
    progress: Callable[..., None],
    root: HeldRoot,
) -> ArtifactWriter:
    """Run a stage that must end because its root is lost; return the writer of what it had committed by then."""
    writer = ArtifactWriter(stage.name, "key", Storage(str(folder)) / stage.name / "key")
    context = StageContext(
        config=config,
        seed=0,
        writer=writer,
        upstream=upstream,
        tracker=null_stage_tracker(),
        progress=progress,
        scratch=folder,
        check=root.check,
    )
    # That the workers end too, tests of compute show.
    with in_this_process(), pytest.raises(UserError, match=TAKEN_OVER):
        stage.run(context)
    return writer


def under_way(done: int, total: int) -> bool:
    return 0 < done < total


def test_encoding_latents_ends_when_another_driver_has_taken_the_root_over(
    ray_cluster: None, tmp_path: Path, root: HeldRoot
) -> None:
    upstream = {"pairs": pairs_artifact(tmp_path, rows=(1,) * ITEMS), "autoencoder": first_stage_artifact(tmp_path)}
    config = latents_config(batch_size=2, workers=1)
    writer = run_until_taken_over(LATENTS, config, tmp_path, upstream, take_over_when(under_way, root), root)
    assert 0 < sum(name.endswith(".tar") for name in writer.committed().names) < ITEMS


def test_sampling_for_evaluation_ends_when_another_driver_has_taken_the_root_over(
    ray_cluster: None, tmp_path: Path, root: HeldRoot
) -> None:
    upstream = {"pairs": pairs_artifact(tmp_path), "diffusion": diffusion_artifact(tmp_path)}
    config = EvaluateConfig(
        prompts=("red circle",) * ITEMS,
        training_captions=0,
        sampling=SamplingConfig(num_steps=2, batch_size=1),
        workers=1,
    )
    writer = run_until_taken_over(EVALUATE, config, tmp_path, upstream, take_over_when(under_way, root), root)
    assert 0 < sum(name.startswith("samples/") for name in writer.committed().names) < ITEMS
    assert not writer.storage.exists("grid.png")


def test_no_pairs_are_published_when_another_driver_has_taken_the_root_over(
    ray_cluster: None, tmp_path: Path, root: HeldRoot
) -> None:
    table = write_pictures(tmp_path / "pictures", 16)
    columns = {"image": "file", "text": "captions"}
    config = PairsConfig.model_validate(
        {"source": str(table), "columns": columns, "image_size": 32, "rows_per_shard": 4}
    )

    def all_are_made(done: int, total: int) -> bool:
        # While shards are made a thread reports the progress; the stage itself does so before the first and at the end.
        by_the_stage = threading.current_thread() is threading.main_thread()
        return by_the_stage and any((tmp_path / "pairs").glob("key/work/*/*.parquet"))

    writer = run_until_taken_over(PAIRS, config, tmp_path, {}, take_over_when(all_are_made, root), root)
    assert not writer.committed().names
