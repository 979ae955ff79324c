"""qtool: one command over three libraries, from a language model to a quantized checkpoint that loads."""
