"""Cameras and rays as pure functions on float32 tensors. Conventions: ``lrm_pl.conventions``."""
