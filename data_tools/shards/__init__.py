"""Commands that create shards from existing views or shards."""
