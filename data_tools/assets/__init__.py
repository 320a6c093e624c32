"""Where meshes come from: one file a source, each ends in ``outcome.write_outputs``."""
