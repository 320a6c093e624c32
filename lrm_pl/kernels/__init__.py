"""Optimized operations, each with a plain PyTorch reference implementation, and device-dependent decisions."""
