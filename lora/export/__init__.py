"""Adapters as GGUFs, alone or merged into their base, with a Modelfile for Ollama.

Imports adapters and below.
"""
