"""Whether an auxiliary network may read its module's output in parts, one after the other (HPFF, arXiv 2407.05638)."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.capture.trace import shadow
from glcan_fx.fx_utils import Network
from glcan_fx.layers import Cost, cost_of


def in_patches(
    network: Network, build: Builder, examples: list[Any], patches: int, cost: Cost
) -> tuple[int, Cost]:
    """How many parts a side the module's output may be read in, one after the other, and what that keeps: where the
    network reads nothing else, and makes predictions of an image from each of its parts."""
    structure, end = build.structure, build.inputs[0]
    sides = structure.spatial(end)
    whole = [node for node in tree_leaves(network.graph.output_node().args) if isinstance(node, fx.Node)]
    outputs = [node.meta["value"] for node in structure.trace.output.all_input_nodes]
    vectors = all(isinstance(value, Tensor) and value.dim() == 2 for value in outputs)
    if patches == 1 or len(build.inputs) > 1 or len(sides) != 2 or end in structure.channels_last or not (
            whole and vectors and not build.terms and min(sides) >= patches):
        return 1, cost
    height, width = (side // patches for side in sides)
    mode = structure.trace.mode
    try:
        with mode:
            part = examples[0][..., :height, :width].clone()
            sizes = network if build.draft else shadow(network, mode)
            saved = cost_of(sizes, partial(sizes.forward, part))[0].saved
    except (RuntimeError, ValueError, TypeError, IndexError):  # a head that takes one size only
        return 1, cost
    return patches, replace(cost, saved=saved)
