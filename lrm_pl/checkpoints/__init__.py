"""Sharded, hashed and atomic training checkpoints in a local folder or an object store. See README.md."""
