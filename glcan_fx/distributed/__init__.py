"""More than one device: local modules on several ranks, gradients that are averaged while the next module computes."""

from glcan_fx.distributed.overlap import overlap
from glcan_fx.distributed.pipeline import Pipeline, PipelineOutput, pipeline

__all__ = ["Pipeline", "PipelineOutput", "overlap", "pipeline"]
