"""Every kernel against its reference on the device at hand: `lora devices --check`.

Imports forward, backward, optim and shaders.
"""
