"""Inference: load a trained model, reconstruct images, export and convert weights."""
