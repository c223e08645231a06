"""The demo's data: pictures for `web` to serve, a LAION-style table of URLs, and prompts for evaluation.

    ROOT/web/images/NNNNNN.jpg|png   a picture for each row of the table, named by the row
    ROOT/web/laion.parquet           URL, TEXT, WIDTH, HEIGHT, similarity, punsafe, pwatermark, hash, NSFW
    ROOT/web/prompts.jsonl           a prompt for each held-out scene
    ROOT/web/complete.json           written last; says what the rest was made from

Hosts in the URLs are made up, and the downloader is told where they are (`connect_to`), so that the table does not
depend on a port.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo import encodings
from jobs.demo.captions import caption, prompt
from jobs.demo.scenes import Scene, held_out_combinations, training_scenes
from pipelines.errors import UserError
from pipelines.store.storage import Storage, sha256_file

FORMAT_VERSION = 1
PICTURES_HOST = "pictures.demo.ldm"
SLOW_HOST = "slow.demo.ldm"
HOSTILE_SHARE = 0.015
MIN_PICTURES = 50
ROW_GROUP_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of row: where its URL points (see `web`) and how its picture is stored, if it has one."""

    name: str
    path: str = "images"
    host: str = PICTURES_HOST
    encoding: encodings.Encoding | None = None
    suffix: str = "jpg"


PICTURE = Kind(name="picture", encoding=encodings.jpeg)
# What the real web serves between the good pictures. A careful decoder can save some of them.
HOSTILE = (
    Kind(name="not_found", path="missing"),
    Kind(name="cmyk", encoding=encodings.cmyk),
    Kind(name="slow", path="slow", host=SLOW_HOST, encoding=encodings.jpeg),
    Kind(name="truncated", path="truncated", encoding=encodings.jpeg),
    Kind(name="palette", encoding=encodings.palette, suffix="png"),
    Kind(name="html", path="page"),
    Kind(name="duplicate", path="copies"),
    Kind(name="flaky", path="flaky", encoding=encodings.jpeg),
    Kind(name="tiny", encoding=encodings.tiny),
    Kind(name="exif_rotated", encoding=encodings.exif_rotated),
    Kind(name="hang", path="hang", host=SLOW_HOST, encoding=encodings.jpeg),
    Kind(name="empty", path="empty"),
    Kind(name="rgba", encoding=encodings.rgba, suffix="png"),
    Kind(name="redirect", path="moved", encoding=encodings.jpeg),
    Kind(name="deep", encoding=encodings.deep, suffix="png"),
)


@dataclass(frozen=True)
class Row:
    """A row of the table, and the picture behind it."""

    index: int
    kind: Kind
    scene: Scene
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.index:06d}.{self.kind.suffix}"

    @property
    def url(self) -> str:
        # The row before a hostile one is always a good picture.
        served = f"{self.index - 1:06d}.jpg" if self.kind.name == "duplicate" else self.file_name
        return f"http://{self.kind.host}/{self.kind.path}/{served}"


@dataclass(frozen=True)
class DemoData:
    """The places of the demo's data.

    Attributes:
        web: the folder to serve.
        table: the table of URLs.
        prompts: the prompts of the held-out scenes.
        counts: rows by kind.
        rendered: False if everything was there already.
    """

    web: Path
    table: Path
    prompts: Path
    counts: dict[str, int]
    rendered: bool


def prepare(root: Path, *, pictures: int = 4000, seed: int = 0) -> DemoData:
    """Render the demo's pictures and write their table and prompts, unless that is already done.

    The same arguments give the same bytes in every file, also after a kill halfway.

    Args:
        root: the demo's folder; everything goes into `root/web`.
        pictures: good pictures in the table; 1.5 % hostile rows come on top, at least one of each kind.
        seed: decides scenes, captions and which combinations are held out.

    Raises:
        UserError: fewer than 50 pictures, or `root` is not a folder.
    """
    if pictures < MIN_PICTURES:
        raise UserError(f"the demo needs at least {MIN_PICTURES} pictures; got {pictures}; ask for more")
    web = Path(root) / "web"
    rows = table_rows(pictures, seed)
    counts = dict(Counter(row.kind.name for row in rows))
    made_from = {"format_version": FORMAT_VERSION, "pictures": pictures, "seed": seed}
    complete = _is_complete(web, made_from, rows)
    if not complete:
        _write(web, made_from, rows)
    return DemoData(
        web=web,
        table=web / "laion.parquet",
        prompts=web / "prompts.jsonl",
        counts=counts,
        rendered=not complete,
    )


def table_rows(pictures: int, seed: int) -> list[Row]:
    """Return the rows of the table in order: good pictures with hostile rows spread evenly between them."""
    hostile = max(len(HOSTILE), round(pictures * HOSTILE_SHARE))
    total = pictures + hostile
    places = {(2 * i + 1) * total // (2 * hostile): HOSTILE[i % len(HOSTILE)] for i in range(hostile)}
    # Row seeds never collide with the small integers that people, tests and sampling use.
    seeds = np.random.default_rng([seed, 4]).integers(1 << 32, 1 << 48, total).tolist()
    scenes = training_scenes(seed, total)
    return [Row(i, places.get(i, PICTURE), scenes[i], seeds[i]) for i in range(total)]


def _is_complete(web: Path, made_from: dict[str, int], rows: list[Row]) -> bool:
    try:
        complete = json.loads((web / "complete.json").read_bytes())
        there = {path.name for path in (web / "images").iterdir()}
        files = {name: sha256_file(web / name) for name in ("laion.parquet", "prompts.jsonl")}
    except (OSError, ValueError, UserError):
        return False
    return complete == {**made_from, "sha256": files} and there >= {row.file_name for row in rows if row.kind.encoding}


def _write(web: Path, made_from: dict[str, int], rows: list[Row]) -> None:
    images = web / "images"
    try:
        images.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"the demo's root must be a folder; {error.filename} is a file; choose another --root"
        ) from None
    # From here on an older marker would be wrong.
    (web / "complete.json").unlink(missing_ok=True)
    for row in rows:
        if row.kind.encoding:
            (images / row.file_name).write_bytes(row.kind.encoding(row.scene, row.seed))
    storage = Storage(str(web))
    with storage.writer("laion.parquet") as path:
        _write_table(path, rows)
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in _prompts(made_from["seed"])]
    storage.write_bytes("prompts.jsonl", "".join(lines).encode())
    files = {name: sha256_file(web / name) for name in ("laion.parquet", "prompts.jsonl")}
    storage.write_json("complete.json", {**made_from, "sha256": files})


def _write_table(path: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist([_columns(row) for row in rows]), path, row_group_size=ROW_GROUP_ROWS)


def _columns(row: Row) -> dict[str, Any]:
    """Return a row as LAION-5B publishes it. The scores are synthetic: plausible numbers that mean nothing."""
    text = caption(row.scene, row.seed)
    scores = np.random.default_rng([row.seed, 5])
    return {
        "URL": row.url,
        "TEXT": text,
        "WIDTH": encodings.SIDE,
        "HEIGHT": encodings.SIDE,
        "similarity": round(float(scores.uniform(0.28, 0.42)), 6),
        "punsafe": round(float(scores.uniform(0.0, 0.05)), 6),
        "pwatermark": round(float(scores.uniform(0.0, 0.3)), 6),
        "hash": int.from_bytes(hashlib.sha256(f"{row.url}{text}".encode()).digest()[:8], "big", signed=True),
        "NSFW": "UNLIKELY",
    }


def _prompts(seed: int) -> Iterator[dict[str, Any]]:
    for item in held_out_combinations(seed):
        yield {"prompt": prompt(item.scene), **asdict(item.scene), "novel_pair": item.novel_pair}
