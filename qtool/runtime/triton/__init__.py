"""Functions that several Triton kernels share."""
