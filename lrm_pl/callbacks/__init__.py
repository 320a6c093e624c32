"""Callbacks that observe a run; they do not change training state."""
