"""Requests in, tokens out: paged KV cache, continuous batching, CUDA graphs, sampling for each
request.
"""
