"""The command line: one file a command, and what they show on a terminal.

Imports every other wing.
"""
