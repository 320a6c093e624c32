"""Triangle meshes: repair, texture, files. numpy only; what a field is, they do not know."""
