"""Auxiliary networks: simplified copies of the remainder of a network behind a cut."""
