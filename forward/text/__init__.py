"""Text and tokens: the tokenizer and the chat template inside a GGUF.

Imports gguf.
"""
