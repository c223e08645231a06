"""The `latents` stage: every pair through the frozen encoders once, cached as WebDataset shards.

Read `vocabulary` (words to ids), `encode` (one shard of pairs to one shard of latents), `statistics` (the
scale factor), `stage`.
"""
