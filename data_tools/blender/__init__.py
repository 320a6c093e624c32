"""Import, normalization and rendering of meshes in Blender."""
