"""Evaluation of trained models under named protocols."""
