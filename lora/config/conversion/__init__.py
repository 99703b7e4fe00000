"""Configs of Axolotl, LLaMA-Factory and mlx-lm turned into ours.

Imports the rest of lora/config, whose checks decide what of a config can be taken over.
"""
