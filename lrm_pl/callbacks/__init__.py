"""Callbacks that observe a run without changing the training state."""
