"""The config of a run: its keys, what they allow, and what is said of wrong ones.

Imports storage.
"""
