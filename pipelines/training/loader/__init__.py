"""Batches on their way from the shards to the device that trains, a few steps ahead of it.

Read `source` (what makes batches), then `open` (which of the two ways they come): by a thread (`prefetch`), or from
processes (`processes`, in each of them `worker`) that write them into memory shared with the training process
(`slots`), pinned for the GPU (`pinning`).
"""
