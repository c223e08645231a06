"""From staged shards to committed ones: duplicates found, scores computed, transient failures retried."""
