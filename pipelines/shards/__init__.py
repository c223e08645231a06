"""Tar shards: how samples are written, found and read, and in which order.

tar_headers                the members of any tar: the parser that all readers share
samples                    how members form samples: the convention that all readers share
format                     writing shards with reproducible bytes, and reading them from beginning to end
index                      where the samples of a shard lie, and their checksums
reader                     samples of our shards by (shard, row), from any store
tar_index                  samples of other people's tars by number
tar_windows                a few samples out of tars that are not read whole
order, mixture, buckets    which sample comes when, from (seed, position) alone
randomness                 what is drawn for it, likewise
"""
