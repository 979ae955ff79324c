"""Any checkpoint as a model that runs: quantized layers multiplied by the fastest kernel the device
has.
"""
