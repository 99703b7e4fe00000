"""The decoder, recorded: layers, head, and new tokens of a text.

Imports the kernels of forward/, model and gguf.
"""
