"""Pure functions for cameras and rays on float32 tensors, with the conventions of ``lrm_pl.conventions``."""
