"""The gradients: one file for each file of forward/ that has any.

Imports forward and shaders.
"""
