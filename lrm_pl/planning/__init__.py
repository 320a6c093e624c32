"""Estimates of the memory and time of a run, based on a training step that is simulated with fake tensors."""
