"""Tables that are text: .csv, .tsv and .jsonl, read whole, with every string as it stands in the file."""

import csv
import functools
import io
import json
from typing import Any

import fsspec

from pipelines.errors import UserError
from pipelines.pairs.fingerprint import stamp

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")


def read_text_table(url: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns and the rows of a text table.

    Cells of .csv and .tsv are strings; a first line that holds a URL is a row, and columns are then called `column_0`…

    Raises:
        UserError: not UTF-8, or a line that is not a row of the table; names the line.
    """
    return _read(url, stamp(url))


# A worker reads many ranges of one table, one after the other.
@functools.lru_cache(maxsize=1)
def _read(url: str, stamp: tuple[int, int] | None) -> tuple[list[str], list[dict[str, Any]]]:
    with fsspec.open(url, "rb") as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{url} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    if url.endswith((".jsonl", ".ndjson")):
        return _jsonl(url, text)
    try:
        return _separated(url, text, "\t" if url.endswith(".tsv") else ",", quoted=True)
    except UserError:
        if not url.endswith(".tsv"):
            raise
        # Published .tsv files mostly do not quote at all, and a caption may begin with a quotation mark.
        return _separated(url, text, "\t", quoted=False)


def _jsonl(url: str, text: str) -> tuple[list[str], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    # Not splitlines(): a caption may hold U+2028, which JSON does not escape.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{url} line {number} is not valid JSON ({error}): mend or remove it") from None
        if not isinstance(row, dict):
            raise UserError(f"{url} line {number} is not a JSON object: one object a line is needed")
        names.update(dict.fromkeys(row))
        rows.append(row)
    return list(names), rows


def _separated(url: str, text: str, delimiter: str, *, quoted: bool) -> tuple[list[str], list[dict[str, Any]]]:
    csv.field_size_limit(2**27)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    names: list[str] | None = None
    rows: list[dict[str, Any]] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if names is None:
                headless = any(cell.startswith(("http://", "https://")) for cell in cells)
                names = [f"column_{i}" for i in range(len(cells))] if headless else cells
                if not headless:
                    continue
            if len(cells) != len(names):
                raise UserError(
                    f"{url} line {reader.line_num} has {len(cells)} fields where the first line has {len(names)}: "
                    "quote fields that hold the separator"
                )
            rows.append(dict(zip(names, cells)))
    except csv.Error as error:
        raise UserError(f"{url} line {reader.line_num} is not a row of the table ({error})") from None
    return names or [], rows
