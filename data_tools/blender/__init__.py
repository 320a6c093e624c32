"""Import, normalization and rendering of meshes with Blender."""
