"""What a model is: its architecture, frozen weights, low-rank factors, inputs and caches.

Imports gguf.
"""
