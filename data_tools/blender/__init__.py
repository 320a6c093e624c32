"""Loading meshes and rendering them with Blender."""
