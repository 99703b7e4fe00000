"""Which tile a product takes, and how that is found out on a device.

Imports shaders. The products, in forward/matmul.py, ask here.
"""
