"""The summary of a pairs artifact: rows by status and host, and histograms over captions and pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.compute.tasks import ForEach, chunks
from pipelines.stages.pairs.held_out import HeldOutSample, SmallestContents
from pipelines.stages.pairs.retries import replaced_rows
from pipelines.stages.pairs.rows_file import RowsFile
from pipelines.stages.pairs.shard.files import read_tables
from pipelines.stages.pairs.shard.outcome import OK
from pipelines.stages.pairs.summary.histogram import Histogram
from pipelines.stages.pairs.summary.hosts import HostCounts
from pipelines.store.ledger import WORK
from pipelines.store.storage import Storage

EDGES: dict[str, tuple[float, ...]] = {
    "caption_words": (0, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 100),
    "caption_characters": (0, 10, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000),
    "aspect": (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 2.0, 2.5, 4.0),
    "source_size": (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096),
}
SHARDS_PER_TASK = 256
_USERINFO = re.compile(r"//[^/]*@")
_COLUMNS = ["row", "key", "status", "url", "caption", "sha256", "width", "height", "bucket"]
_EXAMPLES = 12
_EXAMPLE_CHARACTERS = 300


class Summary(NamedTuple):
    """What the tables of a pairs artifact come to: details for its manifest, and the samples to hold out."""

    details: dict[str, Any]
    held_out: list[HeldOutSample]


def summarise(
    storage: Storage, runs: Sequence[range], *, image_size: int, stored_bytes: int, for_each: ForEach = map
) -> Summary:
    """Summarise a pairs artifact from the tables beside its shards, and choose its held-out samples.

    Histograms are `{"edges": […], "counts": […]}`: counts[i] is of edges[i] <= value < edges[i + 1], the last one is of
    everything from the last edge on. They are over the samples: words and characters of the first caption, width /
    height and shorter side (pixels) of the source's picture.

    Args:
        storage: the artifact's folder.
        runs: the shards of the first run and of each retry, whose statuses replace earlier ones.
        image_size: size of the stored pictures, in pixels.
        stored_bytes: bytes of all tars.
        for_each: maps a function over a range of numbers, somewhere, with the results in order. There is a number for
            every SHARDS_PER_TASK shards.
    """
    groups = [
        (group, replaced)
        for shards, replaced in zip(runs, replaced_rows(storage, runs, for_each))
        for group in chunks(shards, SHARDS_PER_TASK)
    ]

    def summarise_group(number: int) -> dict[str, Any]:
        shards, replaced = groups[number]
        contents = SmallestContents()
        partial = summarise_shards(storage, shards, replaced, contents)
        return {"partial": partial.to_json(), "contents": contents.kept()}

    whole, contents = Partial(), SmallestContents()
    # In order: which hosts are forgotten depends on it, and a summary must not depend on chance.
    for part in for_each(summarise_group, range(len(groups))):
        whole.merge(Partial.from_json(part["partial"]))
        contents.merge(HeldOutSample(*sample) for sample in part["contents"])
    if len(runs) > 1:
        # The rows that are replaced were written down there.
        storage.remove(WORK)
    details = {
        **whole.details(),
        "bytes": stored_bytes,
        "bytes_per_sample": round(stored_bytes / max(whole.statuses[OK], 1)),
        "image_size": image_size,
    }
    return Summary(details, contents.choose(whole.statuses[OK]))


def summarise_shards(
    storage: Storage,
    shards: Sequence[int],
    replaced: RowsFile | None = None,
    contents: SmallestContents | None = None,
) -> Partial:
    """Summarise the tables of some shards, in a bounded amount of memory.

    Args:
        storage: the folder they are in.
        shards: their numbers.
        replaced: rows whose lines do not count; None for none.
        contents: collects the samples that may be held out; None if nobody asks for them.
    """
    partial = Partial()
    for shard, table in zip(shards, read_tables(storage, shards, _COLUMNS), strict=True):
        if replaced is not None:
            # None of them is a sample: a row that gave one is never tried again.
            table = table.filter(~replaced.holds(table.column("row").to_numpy()))
        partial.add(table.combine_chunks())
        if contents is not None:
            contents.add(shard, table)
    return partial


@dataclass
class Partial:
    """The summary of some shards; two of them can be merged."""

    statuses: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, Histogram] = field(default_factory=lambda: {n: Histogram(e) for n, e in EDGES.items()})
    buckets: Counter[str] = field(default_factory=Counter)
    hosts: HostCounts = field(default_factory=HostCounts)
    examples: list[dict[str, str]] = field(default_factory=list)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        """Count the lines of one shard's table."""
        status = table.column("status")
        counts = _counts(status)
        self.statuses.update(counts)
        self.hosts.add(table.column("url"), status)
        good = table.filter(pc.equal(status, OK))
        self._add_samples(good)
        self.examples += map(_example, good.slice(0, _EXAMPLES - len(self.examples)).to_pylist())
        for name in counts.keys() - self.failures.keys() - {OK}:
            first = pc.index(status, name).as_py()
            self.failures[name] = _example(table.slice(first, 1).to_pylist()[0])

    def _add_samples(self, good: pa.Table) -> None:
        caption = good.column("caption").drop_null()
        width, height = (good.column(name).to_numpy() for name in ("width", "height"))
        words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(caption)))
        self.histograms["caption_words"].add(words.to_numpy())
        self.histograms["caption_characters"].add(pc.utf8_length(caption).to_numpy())
        self.histograms["aspect"].add(width / height)
        self.histograms["source_size"].add(np.minimum(width, height))
        if "bucket" in good.column_names:
            self.buckets.update(_counts(good.column("bucket")))

    def merge(self, later: Partial) -> None:
        """Add the summary of shards that come after these."""
        self.statuses.update(later.statuses)
        self.buckets.update(later.buckets)
        self.hosts.merge(later.hosts)
        for name, histogram in self.histograms.items():
            histogram.merge(later.histograms[name])
        self.examples += later.examples[: _EXAMPLES - len(self.examples)]
        self.failures = later.failures | self.failures

    def details(self) -> dict[str, Any]:
        """Return the summary as an artifact's manifest holds it."""
        return {
            "samples": self.statuses[OK],
            "input_rows": self.statuses.total(),
            "statuses": dict(self.statuses),
            **{name: histogram.as_dict() for name, histogram in self.histograms.items()},
            **({"buckets": dict(self.buckets)} if self.buckets else {}),
            "hosts": self.hosts.top(),
            "hosts_exact": self.hosts.exact,
            "examples": self.examples,
            "failures": dict(sorted(self.failures.items())),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "statuses": dict(self.statuses),
            "histograms": {name: histogram.as_dict()["counts"] for name, histogram in self.histograms.items()},
            "buckets": dict(self.buckets),
            "hosts": self.hosts.to_json(),
            "examples": self.examples,
            "failures": self.failures,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Partial:
        return cls(
            statuses=Counter(value["statuses"]),
            histograms={name: Histogram(EDGES[name], counts) for name, counts in value["histograms"].items()},
            buckets=Counter(value["buckets"]),
            hosts=HostCounts.from_json(value["hosts"]),
            examples=value["examples"],
            failures=value["failures"],
        )


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    return {line["values"]: line["counts"] for line in values.value_counts().to_pylist()}


def _example(row: dict[str, Any]) -> dict[str, str]:
    values = {name: row[name] for name in ("key", "caption", "url")}
    if values["url"] is not None:
        # Passwords and signatures belong to the data, not to manifests and reports.
        values["url"] = _USERINFO.sub("//", values["url"].partition("?")[0], count=1)
    return {name: value[:_EXAMPLE_CHARACTERS] for name, value in values.items() if value is not None}
