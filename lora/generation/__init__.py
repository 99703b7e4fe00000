"""Text from a model: the prompt, then token by token.

Imports adapters and below.
"""
