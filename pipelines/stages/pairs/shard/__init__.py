"""One shard: its files (`files`), what becomes of a row (`outcome`), and the shard before it is published (`staged`)."""
