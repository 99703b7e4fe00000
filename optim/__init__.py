"""AdamW, gradient clipping, learning-rate schedules.

Imports forward and shaders.
"""
