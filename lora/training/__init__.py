"""TrainingSession, its programs, and a run with its files.

Imports generation and below.
"""
