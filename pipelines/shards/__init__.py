"""Tar shards: how samples are written, found and read, and in which order.

format                     a sample as files of a tar, written with reproducible bytes
reader                     samples by (shard, row), from any store
order, randomness          which sample comes when, from (seed, position) alone
tar_headers, tar_index     where members lie in tars that others wrote
tar_windows                a tar in pieces that fit into memory
"""
