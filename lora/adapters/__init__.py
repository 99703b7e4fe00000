"""Adapters on disk: as PEFT and as llama.cpp keep them.

Imports config, data and storage.
"""
