"""Training steps on fake tensors: memory and compute, without either."""
