"""Blocks between which a network cannot be cut, and why: what a user would otherwise only see in a small k."""

from collections import Counter
from collections.abc import Mapping, Set

from torch import fx, nn

from glcan_fx.capture.trace import within
from glcan_fx.structure.nodes import called_path
from glcan_fx.structure.structure import Structure, once

_SEVERAL = 3  # fewer are branches


@once
def missed_blocks(structure: Structure) -> list[str]:
    """For every row of blocks of one class that lie in one unit, or behind the trunk, a sentence. Not for the branches
    of a block that is a unit, and not for a neck and head, unless these hold half of the layers."""
    trace, units = structure.trace, structure.units
    owner = structure.assign([unit.end for unit in units])
    layers = Counter(owner[node] for node in trace.layers if node in owner)
    found = _units_of(owner, trace.layers)
    rows: dict[int, list[tuple[int, str]]] = {}  # of every unit, with the depth of their modules
    for path, module in trace.shadow.named_modules():
        for kind, names in _rows(module).items():
            lying: dict[int, list[str]] = {}
            for inner in (f"{path}.{name}" if path else name for name in names):
                if len(found.get(inner, ())) == 1:
                    lying.setdefault(next(iter(found[inner])), []).append(inner)
            index, paths = max(lying.items(), key=lambda one: len(one[1]), default=(0, []))
            if len(paths) < _SEVERAL or 2 * sum(found[name].total() for name in paths) < layers[index]:
                continue  # branches of what is more
            tail = index == len(units)
            block = not tail and any(within(path, name) for name in (units[index].name, *units[index].aliases))
            if (tail or block) and 2 * layers[index] < layers.total() or tail and kind == nn.Sequential.__name__:
                continue
            why = (f"they lie behind the trunk, which ends at '{units[-1].name}'" if tail
                   else "more than one value passes from each to what follows, and a local module ends with one")
            sentence = f"no cut between '{paths[0]}' … '{paths[-1]}' ({len(paths)} of class {kind}): {why}"
            rows.setdefault(index, []).append((path.count(".") if path else -1, sentence))
    return [sentence for row in rows.values() for depth, sentence in row if depth == min(row)[0]]


def _rows(module: nn.Module) -> Mapping[str, list[str]]:
    """The names of a module's children that have parts of their own, by class."""
    found: dict[str, list[str]] = {}
    for name, child in module.named_children():
        if any(True for _ in child.children()) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            found.setdefault(type(child).__name__, []).append(name)
    return found


def _units_of(owner: Mapping[fx.Node, int], layers: Set[fx.Node]) -> dict[str, Counter[int]]:
    """Of every module's path, how many of its layers lie in which units."""
    found: dict[str, Counter[int]] = {}
    for node in layers:
        path = called_path(node) or node.meta["module"]
        while path and node in owner:
            found.setdefault(path, Counter())[owner[node]] += 1
            path = path.rpartition(".")[0]
    return found
