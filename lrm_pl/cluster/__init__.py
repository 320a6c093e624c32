"""Slurm jobs, launching processes, and checks of nodes."""
