"""Rendering of a folder of meshes into shards, on one machine or on a cluster."""
