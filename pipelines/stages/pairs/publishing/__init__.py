"""From staged shards to committed ones: duplicates found, scores computed, retries dealt out."""
