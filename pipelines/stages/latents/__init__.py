"""The `latents` stage: encode every pair once with the frozen first stage, and cache the result as WebDataset shards.

Read `encode` (one shard of pairs to one shard of latents), `shard` (how it is committed), `statistics` (the scale
factor), `stage`; `artifact` is how training reads the cache. What is cached beside the latents is for
`pipelines.conditions` to say.
"""
