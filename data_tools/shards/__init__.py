"""Writing shards from those of others."""
