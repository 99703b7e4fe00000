"""Faults that a run is put through, and a soak: what docs/reliability.md tells."""
