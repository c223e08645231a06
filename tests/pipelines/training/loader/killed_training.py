"""A training process that takes a batch, if one can be made, says which processes make them, and waits to be killed."""

import sys
import time
from pathlib import Path

import torch

from pipelines.training.loader.processes import ProcessLoader
from tests.pipelines.training.loader.numbers import Numbers

if __name__ == "__main__":
    source = Numbers(Path(sys.argv[1]))
    loader = ProcessLoader(source, 0, 1, 0, 10**9, processes=2, device=torch.device("cpu"))
    # Nobody reads from a pipe: whoever writes to it waits for ever.
    if not source.log.is_fifo():
        loader.next()
    print(*(worker.process.pid for worker in loader._workers), flush=True)
    time.sleep(600)
