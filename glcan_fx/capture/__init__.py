"""A call of a model on fake tensors, recorded as a graph."""
