"""GGUF files: metadata, tensors, and how each tensor type lies in the file and on the device.

Imports shaders.
"""
