"""What our Triton kernels share."""
