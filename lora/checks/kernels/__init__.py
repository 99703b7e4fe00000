"""The checks, one file for a few kernels that belong together; each has a list CHECKS."""
