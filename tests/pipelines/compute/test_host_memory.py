"""Freed memory is kept, seen in the page faults of a fresh process."""

import subprocess
import sys

PROGRAM = """
import resource, sys, torch
from pipelines.compute.host_memory import keep_freed_memory
torch.set_num_threads(1)
assert sys.argv[1] == "default" or keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): torch.ones(2**24)
before = faults()
for _ in range(5): torch.ones(2**24)
print(faults() - before)
"""


def page_faults(setting: str) -> int:
    """Count the page faults of filling five tensors of 64 MiB one after the other, after ten others."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, setting], capture_output=True, text=True, check=True)
    return int(result.stdout)


def test_a_large_tensor_reuses_the_memory_of_one_that_was_freed() -> None:
    kept, returned = page_faults("kept"), page_faults("default")
    assert returned > 100
    assert kept < returned / 10
