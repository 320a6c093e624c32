"""Observers of a run: they measure, show and record; they never change training state."""
