"""Values on their way between workers: rows of Arrow tables, whose large arrays stay mapped from the object store.

position      int64         which item it is
value         large_binary  the value, pickled without its large arrays
error         string        the line that a person should read, if a worker refused the item
bug           large_binary  the pickled exception of a worker, if it is a bug
array0, …     large_binary  the memory of the arrays

Ray would pickle Python objects of a block as a whole: an array would be copied four times from worker to worker. Here
it is copied once, into the object store, and whoever gets it reads it there; such arrays are read-only.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

# Below, a column of its own costs more than a copy.
SMALLEST_ARRAY_BYTES = 1 << 16


def pack(position: int, value: Any = None, *, error: str = "", bug: bytes = b"") -> pa.Table:
    """Return a table of one row with a value; its contiguous large arrays are not copied."""
    arrays: list[pa.Buffer] = []

    def leave_out(buffer: pickle.PickleBuffer) -> bool:
        memory = buffer.raw()
        if memory.nbytes < SMALLEST_ARRAY_BYTES:
            return True
        arrays.append(pa.py_buffer(memory))
        return False

    pickled = pickle.dumps(value, protocol=5, buffer_callback=leave_out)
    columns = _columns([position], [pickled], [error], [bug])
    for number, memory in enumerate(arrays):
        ends = pa.py_buffer(np.array([0, memory.size], np.int64))
        columns[f"array{number}"] = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, memory])
    return pa.table(columns)


def pack_all(values: Sequence[Any]) -> pa.Table:
    """Return a table of many small values, a row each; a value's position is its place."""
    rows = len(values)
    return pa.table(_columns(range(rows), [pickle.dumps(each) for each in values], [""] * rows, [b""] * rows))


def _columns(
    positions: Sequence[int], values: Sequence[bytes], errors: Sequence[str], bugs: Sequence[bytes]
) -> dict[str, pa.Array]:
    return {
        "position": pa.array(positions, pa.int64()),
        "value": pa.array(values, pa.large_binary()),
        "error": pa.array(errors, pa.string()),
        "bug": pa.array(bugs, pa.large_binary()),
    }


def unpack(row: pa.Table) -> Any:
    """Return the value of a table of one row; its large arrays are views of the table's memory."""
    arrays: list[pa.Buffer] = []
    while (name := f"array{len(arrays)}") in row.column_names:
        array = row.column(name).chunk(0)
        # Not by the value of the row: Arrow would copy it.
        _, ends, memory = array.buffers()
        start, end = np.frombuffer(ends, np.int64)[array.offset : array.offset + 2]
        arrays.append(memory.slice(start, end - start))
    return pickle.loads(row.column("value")[0].as_buffer(), buffers=arrays)
