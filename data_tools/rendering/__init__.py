"""Rendering a folder of meshes to shards, on one machine or many."""
