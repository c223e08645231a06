"""The hosts that the rows of a data set come from, with the outcomes of their rows."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.stages.pairs.shard.outcome import OK

# With more hosts than this the smallest are forgotten, and the counts of the others are approximate: a host may have
# been forgotten before it grew.
MOST_HOSTS = 4096
TOP_HOSTS = 20
# Rows are collected up to this number before they are counted: one aggregation costs less than many.
_COUNTED_AT_ONCE = 1 << 16
_LONGEST_HOST = 255
# The host in the authority part of a URL (between "//" and the next "/"), without user, password and port.
_HOST = r"(?s)^(?:.*@)?(\[[^\]]*\]|[^:?#]*).*$"


class HostCounts:
    """Rows by host and status, in memory that does not grow with the number of hosts.

    Args:
        most: hosts to keep; up to twice as many are held until the smallest half is forgotten.

    Attributes:
        exact: whether no host had to be forgotten.
    """

    def __init__(self, most: int = MOST_HOSTS) -> None:
        self.exact = True
        self._most = most
        schema = pa.schema({"host": pa.string(), "status": pa.string(), "rows": pa.int64()})
        self._counts = schema.empty_table()
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0

    def add(self, urls: pa.Array, statuses: pa.Array) -> None:
        """Count rows by their URLs and statuses; rows whose URL names no host are left out."""
        # "https:", "", "host", "path": columns of strings are split by Arrow; a URL parser would take a row at a time.
        parts = pc.split_pattern(urls, "/", max_splits=3)
        known = pc.fill_null(pc.greater_equal(pc.list_value_length(parts), 3), False)
        between = pc.utf8_slice_codeunits(pc.list_element(parts.filter(known), 2), 0, _LONGEST_HOST)
        self._waiting.append(pa.table({"host": between, "status": statuses.filter(known)}))
        self._waiting_rows += len(between)
        if self._waiting_rows >= _COUNTED_AT_ONCE:
            self._settle()

    def merge(self, later: HostCounts) -> None:
        self._settle()
        later._settle()
        self._join(later._counts)
        self.exact = self.exact and later.exact

    def top(self, most: int = TOP_HOSTS) -> list[dict[str, Any]]:
        """List the hosts with the most rows: `host`, `rows`, the share `ok` and the most frequent `failure`, if any."""
        self._settle()
        hosts = self._largest(most).column("host").to_pylist()
        found: dict[str, dict[str, int]] = {host: {} for host in hosts}
        for line in self._of(hosts).to_pylist():
            found[line["host"]][line["status"]] = line["rows"]
        return [_line(host, statuses) for host, statuses in found.items()]

    def to_json(self) -> dict[str, Any]:
        self._settle()
        return {"exact": self.exact, "counts": self._counts.to_pydict()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> HostCounts:
        counts = cls()
        counts.exact = value["exact"]
        counts._counts = pa.table(value["counts"], schema=counts._counts.schema)
        return counts

    def _settle(self) -> None:
        if not self._waiting:
            return
        found = _summed(pa.concat_tables(self._waiting), ([], "count_all"))
        self._waiting, self._waiting_rows = [], 0
        hosts = pc.utf8_lower(pc.replace_substring_regex(found.column("host"), _HOST, r"\1"))
        found = found.set_column(0, "host", hosts)
        self._join(found.filter(pc.not_equal(hosts, "")))

    def _join(self, counts: pa.Table) -> None:
        self._counts = _summed(pa.concat_tables([self._counts, counts.cast(self._counts.schema)]), ("rows", "sum"))
        # Not at every host above the limit: forgetting costs a sort.
        if pc.count_distinct(self._counts.column("host")).as_py() > 2 * self._most:
            self._counts = self._of(self._largest(self._most).column("host").to_pylist())
            self.exact = False

    def _largest(self, most: int) -> pa.Table:
        totals = self._counts.group_by("host", use_threads=False).aggregate([("rows", "sum")])
        return totals.sort_by([("rows_sum", "descending"), ("host", "ascending")]).slice(0, most)

    def _of(self, hosts: list[str]) -> pa.Table:
        return self._counts.filter(pc.is_in(self._counts.column("host"), value_set=pa.array(hosts, pa.string())))


def _summed(table: pa.Table, aggregation: tuple[Any, str]) -> pa.Table:
    """Aggregate to one line for each host and status, sorted."""
    summed = table.group_by(["host", "status"], use_threads=False).aggregate([aggregation])
    return summed.rename_columns(["host", "status", "rows"]).sort_by([("host", "ascending"), ("status", "ascending")])


def _line(host: str, statuses: dict[str, int]) -> dict[str, Any]:
    rows, ok = sum(statuses.values()), statuses.get(OK, 0)
    failures = {status: count for status, count in statuses.items() if status != OK}
    failure = min(failures, key=lambda status: (-failures[status], status), default=None)
    return {"host": host, "rows": rows, "ok": round(ok / rows, 4), "failure": failure}
