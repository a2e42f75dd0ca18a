"""The parts of a network that may run again in backward: blocks of the trunk, and what neck and head consist of."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from glcan_fx.structure.nodes import common_path
from glcan_fx.structure.structure import Structure


@dataclass(frozen=True)
class PartsOf:
    """names: of the trunk's blocks, in order; behind: of the parts of neck and head, in the order in which they begin;
    of: the name of the part that every node belongs to."""

    names: tuple[str, ...]
    behind: tuple[str, ...]
    of: Mapping[fx.Node, str]


def parts_of(structure: Structure) -> PartsOf:
    """The units of the trunk; behind it the children of the module that holds all of neck and head."""
    owner = structure.assign([unit.end for unit in structure.units])
    units = [unit.name for unit in structure.units]
    after = [node for node in structure.trace.graph.nodes if node in owner and node not in structure.trunk]
    depth = len(_path(common_path(after)))
    groups: dict[str, list[fx.Node]] = {}
    for node in after:
        path = _path(str(node.target) if node.op == "call_module" else node.meta["module"])
        groups.setdefault(".".join(path[: depth + 1]), []).append(node)
    of = {node: units[min(index, len(units) - 1)] for node, index in owner.items() if node in structure.trunk}
    behind = []
    for group, nodes in groups.items():
        name = common_path(nodes) or group
        of |= dict.fromkeys(nodes, name)
        if name and any(node.meta["saved"] for node in nodes):
            behind.append(name)
    return PartsOf(tuple(units), tuple(behind), of)


def _path(name: str) -> list[str]:
    return name.split(".") if name else []
