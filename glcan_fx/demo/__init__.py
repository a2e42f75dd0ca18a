"""A small detector, trained twice."""
