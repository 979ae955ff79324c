"""Layers of experts. `grouped` multiplies all experts of a step in a few launches; `per_expert` is
for models whose code takes one expert after another.
"""
