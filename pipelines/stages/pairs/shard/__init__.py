"""One shard: its files (`files`), the outcome of each row (`outcome`), and the shard before publication (`staged`)."""
