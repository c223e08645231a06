"""A process that reads shards: `python -m tests.pipelines.shards.cache_user URL RECORDS`, RECORDS a file of JSON.

Reads lines such as `read 0 2` and `ahead 1 3` (numbers of shards), and answers each with a line when it is done; closes
its reader at the end of its input.
"""

import contextlib
import json
import sys
from pathlib import Path

from pipelines.shards.reader import ShardReader
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.storage import Storage

if __name__ == "__main__":
    shards = FileTable.of(FileRecord.model_validate(each) for each in json.loads(Path(sys.argv[2]).read_text()))
    with contextlib.closing(ShardReader(Storage(sys.argv[1]), shards)) as reader:
        print("ready", flush=True)
        for line in sys.stdin:
            what, *numbers = line.split()
            if what == "ahead":
                reader.fetch_ahead([int(number) for number in numbers])
                print("asked", flush=True)
            else:
                print(*(reader.read(int(number), 0)["txt"].decode() for number in numbers), sep=", ", flush=True)
