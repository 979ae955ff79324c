"""Causal attention over a paged KV cache: the interface, and one file for each implementation."""
