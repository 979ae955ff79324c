"""Writes a checkpoint as one GGUF file, which llama.cpp reads.

Source: llama.cpp, `convert_hf_to_gguf.py` and `llama-quant.cpp`; gguf 0.19.
"""
