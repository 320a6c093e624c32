"""Data preparation. The package converts meshes to shards and runs in the render environment."""
