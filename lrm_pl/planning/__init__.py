"""Estimated memory and time of a run, from a simulated training step on fake tensors."""
