"""The frozen model out of a GGUF: architecture, weights, tokenizer, the forward pass.

Imports shaders.
"""
