"""The GPU runtime (device, buffers, programs) and every WGSL kernel.

Imports no other room.
"""
