"""Shards from existing data: convert, repack, merge, index."""
