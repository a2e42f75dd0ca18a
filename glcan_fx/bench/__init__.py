"""Training methods compared on one model."""
