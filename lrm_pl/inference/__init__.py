"""Inference with trained models, and export and conversion of weights."""
