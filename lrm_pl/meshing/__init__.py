"""Mesh extraction, simplification, texturing and export."""
