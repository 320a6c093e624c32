"""Optimized operations with PyTorch reference implementations, and decisions that depend on the device."""
