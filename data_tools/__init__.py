"""Data preparation tools, which convert meshes and images to shards in the render environment (``.venv-render``)."""
