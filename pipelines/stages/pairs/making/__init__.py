"""A worker of the `pairs` stage: rows are downloaded, decoded, resized and written to a staged shard."""
