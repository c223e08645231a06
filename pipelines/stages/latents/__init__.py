"""The `latents` stage: encode every pair once with the frozen first stage, and cache the result as WebDataset shards.

Read `encoding` (one shard of pairs to one shard of latents, in three steps), `shard` (how it is committed),
`statistics` (the scale factor), `stage`; `artifact` is how training reads the cache. What is cached beside the latents
is for `pipelines.conditions` to say.
"""
