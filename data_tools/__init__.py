"""Turn meshes into shards: ``python -m data_tools <command>``, in the render environment, without torch."""
