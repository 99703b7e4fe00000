"""Rows of a data set, as tokens and as micro-batches.

Imports config and storage.
"""
