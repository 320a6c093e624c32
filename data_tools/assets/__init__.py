"""Asset lists, and the sources that ``fetch`` downloads meshes from."""
