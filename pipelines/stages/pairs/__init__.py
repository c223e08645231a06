"""The `pairs` stage: raw image-text pairs to WebDataset shards.

sources       tables, folders and tars that pairs come from
web           downloads
pictures      decoding, resizing, encoding, measuring
making        one worker: rows in, a staged shard out
shard         the files of one shard, before and after it is published
publishing    duplicates left out, samples scored, failed rows retried; shards committed
summary       counts, histograms, hosts and a contact sheet of the result
"""
