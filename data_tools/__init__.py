"""Data preparation: from meshes to shards. Runs in the render environment."""
