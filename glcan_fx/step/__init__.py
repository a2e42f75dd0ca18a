"""The training step: its graph, local gradients, and the module that runs it."""

from glcan_fx.step import variants  # noqa: F401 - a compiled model that is read from a file may meet other sizes
