"""Cameras and rays: pure functions on float32 tensors, in the conventions of ``lrm_pl.conventions``."""
