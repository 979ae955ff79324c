"""Measures how good a quantized checkpoint is."""
