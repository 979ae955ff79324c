"""Whether a quantized checkpoint is still good."""
