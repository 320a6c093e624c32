"""Measures and checks of assets, shards and cameras."""
