"""Pass 3, partition: where one does cut. Natural, merged to k modules with the smallest peak, or as the user says."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import fx

from glcan_fx.capture.trace import hasattr_path
from glcan_fx.config import K
from glcan_fx.errors import PlanError
from glcan_fx.pytree import tensors_in
from glcan_fx.structure.nodes import is_size
from glcan_fx.structure.structure import Structure, Unit
from glcan_fx.structure.trunk import unit_at


def partition(
    structure: Structure, k: K, units: Sequence[Unit], aux_bytes: Callable[[Unit], int], tail_bytes: Callable[[], int]
) -> list[Unit]:
    """The units after which to cut: k - 1 of them, in order.

    k: "natural" (after every unit), a number of local modules, or a list of split points (module paths). With a
    number below the natural one, neighbours are merged so that the largest module is smallest: the bytes that are live
    in its backward pass, its auxiliary network's among them (``aux_bytes`` of the unit that it ends with;
    ``tail_bytes`` for the last).
    Raises PlanError for a k that the model does not offer, with the list of split points.
    """
    units = list(units)
    if isinstance(k, str) and k == "natural":
        return units[:-1]
    if isinstance(k, str) or not isinstance(k, int | Sequence):
        raise PlanError(f"k must be a number, 'fewest', 'natural' or a list of split points, not {k!r}"
                        + (f": did you mean k={k}?" if isinstance(k, str) and k.isdecimal() else ""))
    if isinstance(k, Sequence):
        return _explicit(structure, k)
    if isinstance(k, bool) or not 1 <= k <= max(len(units), 1):
        offers = ", ".join(unit.name for unit in units[:-1]) or "none"
        remedy = "Choose a smaller k" if not isinstance(k, bool) and k > 1 else "Choose k of 1 (no cut) or more"
        raise PlanError(
            f"k={k} local modules are not possible: this model offers 1 to {max(len(units), 1)}. Its natural split "
            f"points are: {offers}. {remedy}, or pass a list of module paths to cut elsewhere."
        )
    if k in (1, len(units)):
        return units[:-1] if k > 1 else []
    used = structure.uses([unit.end for unit in units[:-1]])  # the tail's are the last unit's
    costs = costs_of([unit.saved for unit in used], [unit.gradients for unit in used], carried(structure, units),
                     [*(aux_bytes(unit) for unit in units[:-1]), tail_bytes()])
    return [units[end - 1] for end in merge(costs, k)]


class ModuleCost(NamedTuple):
    """Of a local module, in bytes. most: that are live during its backward pass; kept: by itself for that pass."""

    most: int
    kept: int


def costs_of(
    kept: Sequence[int], gradients: Sequence[int], carried: Sequence[Sequence[tuple[int, int]]], behind: Sequence[int]
) -> list[list[ModuleCost]]:
    """What local modules cost, by their first unit and the one behind their last.

    The backward pass goes through a module's units from the last to the first. At each of them there are the gradients
    of all earlier modules, values that earlier modules made and somebody still reads, what this unit and those in
    front of it keep, and the gradients of those behind it; at the last unit also what the auxiliary network keeps.
    Weights, the optimizer's state, and what a loss allocates meanwhile, are left out.

    Args, all in bytes: what each unit keeps for backward, the gradients of its parameters, the values of earlier units
    that live on in it (see ``carried``), what the auxiliary network or tail keeps that follows it.
    """
    n = len(kept)
    so_far, made = [0, *accumulate(kept)], [0, *accumulate(gradients)]
    found = []
    for start in range(n):
        row, worst = [ModuleCost(0, 0)] * (start + 1), -made[start]
        for end in range(start + 1, n + 1):
            own = so_far[end] - so_far[start]
            worst = max(worst, own - made[end])  # over the units: kept up to it, less the gradients that are missing
            earlier = sum(size for size, keeper in carried[start] if not start <= keeper < end)
            most = made[start] + earlier + max(own + behind[end - 1], worst + made[end])
            row.append(ModuleCost(most, own + behind[end - 1]))
        found.append(row)
    return found


def _explicit(structure: Structure, names: Sequence[str]) -> list[Unit]:
    found: dict[fx.Node, Unit] = {}
    for name in names:
        unit = unit_at(structure, name)
        if unit is None or unit.end is structure.chain[-1]:
            offers = ", ".join(u.name for u in structure.units[:-1])
            if unit:
                reason = "ends the trunk, and the last module owns what follows"
            elif hasattr_path(structure.trace.shadow, str(name).partition(":")[0]):
                reason = "is inside a block, or beside the trunk: other values pass it by"
            else:
                reason = "is not a module of this model"
            raise PlanError(f"split point '{name}' {reason}. Natural split points: {offers}.")
        found[unit.end] = unit
    order = {node: index for index, node in enumerate(structure.chain)}
    return sorted(found.values(), key=lambda unit: order[unit.end])


def carried(structure: Structure, units: Sequence[Unit]) -> list[list[tuple[int, int]]]:
    """Of each unit: the values of earlier ones that are read in it or behind it, and so live on while it runs; of each
    value its bytes, and the unit for whose backward pass it is kept first (-1: for none)."""
    owner = structure.assign([unit.end for unit in units[:-1]])
    counted = {key: index for node, index in owner.items() for key in node.meta["storages"]}
    sizes: dict[int, int] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for node, index in owner.items():
        if node.op in ("placeholder", "get_attr"):
            continue  # they live for the whole step
        readers = [owner.get(user, len(units) - 1) for user in node.users if not is_size(user)]
        for tensor in tensors_in(node.meta.get("value")):
            storage = tensor.untyped_storage()
            key = storage._cdata
            sizes[key] = storage.nbytes()
            first[key] = min(first.get(key, index), index)
            last[key] = max([last.get(key, index), *readers])
    found: list[list[tuple[int, int]]] = [[] for _ in units]
    for key, size in sizes.items():
        for index in range(first[key] + 1, last[key] + 1):
            found[index].append((size, counted.get(key, -1)))
    return found


def merge(costs: Sequence[Sequence[ModuleCost]], k: int) -> list[int]:
    """Split units into k runs with the smallest largest one: for all runs but the last, the number of units up to
    its end. ``costs``: of the run from one unit up to another, not included.

    A dynamic programme over (units so far, runs so far); smallest maximum, then smallest sum of squares of what the
    runs keep.
    """
    n = len(costs)
    best: list[dict[int, tuple[int, int, int]]] = [{0: (0, 0, -1)}]  # per count: {units: (peak, squares, last cut)}
    for _ in range(k):
        row: dict[int, tuple[int, int, int]] = {}
        for end in range(1, n + 1):
            options = []
            for start, (peak, squares, _) in best[-1].items():
                if start < end:
                    most, kept = costs[start][end]
                    options.append((max(peak, most), squares + kept * kept, start))
            if options:
                row[end] = min(options)
        best.append(row)
    ends, end = [], n
    for count in range(k, 0, -1):
        end = best[count][end][2]
        if end > 0:
            ends.append(end)
    return ends[::-1]
