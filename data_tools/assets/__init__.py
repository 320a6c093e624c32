"""Asset lists, and the sources from which ``fetch`` downloads meshes."""
