"""What each kernel computes, in float64 numpy: written for reading, one file a kernel family.

Tests import it, and `lora devices --check`. Imports forward for constants of a layout only.
"""
