"""Pass 3, partition: where one does cut. Natural, merged to k modules with the smallest peak, or as the user says."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import fx

from .analyze import Structure, Unit, ancestors, unit_at
from .errors import PlanError
from .trace import hasattr_path

K = int | Literal["natural", "fewest", "auto"] | Sequence[str]


def partition(
    structure: Structure, k: K, units: Sequence[Unit], aux_bytes: Callable[[Unit], int], tail_bytes: Callable[[], int]
) -> list[Unit]:
    """The units after which to cut: k - 1 of them, in order.

    k: "natural" (after every unit), a number of local modules, or a list of split points (module paths). With a
    number below the natural one, neighbours are merged so that the largest module, its own saved bytes plus its
    auxiliary network's (``aux_bytes`` of the unit that it ends with; ``tail_bytes`` for the last), is smallest.
    Raises PlanError for a k that the model does not offer, with the list of split points.
    """
    units = list(units)
    if isinstance(k, str) and k == "natural":
        return units[:-1]
    if isinstance(k, str) or not isinstance(k, int | Sequence):
        raise PlanError(f"k must be a number, 'natural', 'fewest' or a list of split points, not {k!r}"
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
    ends = merge(unit_bytes(structure, units), [aux_bytes(unit) for unit in units[:-1]] + [tail_bytes()], k)
    return [units[end - 1] for end in ends]


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
                reason = "is no module of this model"
            raise PlanError(f"split point '{name}' {reason}. Natural split points: {offers}.")
        found[unit.end] = unit
    order = {node: index for index, node in enumerate(structure.chain)}
    return sorted(found.values(), key=lambda unit: order[unit.end])


def unit_bytes(structure: Structure, units: Sequence[Unit]) -> list[int]:
    """Bytes that each unit keeps for backward; the tail's are added to the last."""
    done: set[fx.Node] = set()
    sizes = []
    for unit in units:
        own = ancestors([unit.end]) - done
        done |= own
        sizes.append(sum(node.meta["saved"] for node in own))
    sizes[-1] += sum(node.meta["saved"] for node in structure.trace.graph.nodes if node not in done)
    return sizes


def merge(own: Sequence[int], behind: Sequence[int], k: int) -> list[int]:
    """Split units into k runs with the smallest largest one: for all runs but the last, the number of units up to
    its end. A run costs its units' bytes, ``own``, and those ``behind`` its last unit.

    A dynamic programme over (units so far, runs so far); smallest maximum, then smallest sum of squares.
    """
    n, total = len(own), [0]
    for size in own:
        total.append(total[-1] + size)
    best: list[dict[int, tuple[int, int, int]]] = [{0: (0, 0, -1)}]  # per count: {units: (peak, squares, last cut)}
    for _ in range(k):
        row: dict[int, tuple[int, int, int]] = {}
        for end in range(1, n + 1):
            options = []
            for start, (peak, squares, _) in best[-1].items():
                if start < end:
                    size = total[end] - total[start] + behind[end - 1]
                    options.append((max(peak, size), squares + size * size, start))
            if options:
                row[end] = min(options)
        best.append(row)
    ends, end = [], n
    for count in range(k, 0, -1):
        end = best[count][end][2]
        if end > 0:
            ends.append(end)
    return ends[::-1]
