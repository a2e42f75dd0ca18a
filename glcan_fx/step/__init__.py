"""The training step: its graph, local gradients, and the module that runs it."""
