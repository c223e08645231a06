"""One shard of pairs to one shard of latents, in three steps: `read`, `encode`, `write`; `shards` goes between them."""
