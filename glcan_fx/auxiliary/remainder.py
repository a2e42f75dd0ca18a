"""The remainder: what the network still has to compute behind a cut, and what of it a local loss reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from glcan_fx.auxiliary.features import Feature, FeatureInfo, Rules, State
from glcan_fx.auxiliary.tails import Tail, tail_of
from glcan_fx.errors import PlanError
from glcan_fx.structure.nodes import is_size
from glcan_fx.structure.structure import Structure, Tap, Unit
from glcan_fx.tasks import Task


@dataclass(frozen=True)
class Remainder:
    """What an auxiliary network simplifies: the network behind ``unit``, the end of local module ``index`` of ``cuts``
    that have one (with blocks that its loss passes through, their end).

    owner: the local module of every recorded node. levels: the indices of the network's output levels that the local
    loss is computed on, sigma: their weights (eq. 8); both empty where the network's outputs are predictions.
    """

    structure: Structure
    task: Task
    unit: Unit
    index: int
    owner: dict[fx.Node, int]
    levels: tuple[int, ...]
    sigma: tuple[float, ...]
    cuts: int

    @property
    def depth(self) -> float:
        """How deep the local module stands among those with auxiliary networks: 0 for the first, 1 for the last."""
        return self.index / max(1, self.cuts - 1)

    @property
    def end(self) -> fx.Node:
        """The value that the auxiliary network begins with: the local module's output."""
        return self.unit.end

    @property
    def predicts(self) -> bool:
        """Whether the network's outputs are predictions, and not feature maps that a task's head reads."""
        return not self.task.outputs_are_levels

    @property
    def info(self) -> FeatureInfo:
        """The local module's output, as rules see it."""
        return feature_info(self.structure, self.end, self.unit.name)

    @cached_property
    def outputs(self) -> Any:
        """The nodes that an auxiliary network computes, nested as the network returns them."""
        levels = levels_of(self.structure, self.task)
        if levels is None:
            return self.structure.trace.output.args[0]
        keys = list(levels)
        return {keys[index]: levels[keys[index]] for index in self.levels}

    @property
    def weights(self) -> dict[Any, float]:
        """Weights of the outputs by key."""
        return dict(zip(self.outputs, self.sigma, strict=True)) if self.sigma else {}

    @cached_property
    def tail(self) -> Tail:
        """What follows the trunk for these outputs."""
        return tail_of(self.structure, self.outputs)

    @cached_property
    def taps(self) -> list[Tap]:
        """The taps whose values, and not their sizes alone, are read for these outputs."""
        inside = {*self.tail.nodes, self.structure.trace.output}
        read = {tap for tap in self.tail.taps if any(user in inside and not is_size(user) for user in tap.users)}
        return [tap for tap in self.structure.taps if tap.node in read]

    def maker(self, tap: Tap) -> int:
        """The local module that makes a tap; -1 for an input."""
        return -1 if tap.node.op == "placeholder" else self.owner[tap.node]

    def selected(self, rules: Rules) -> tuple[Feature, ...]:
        """The features that the selection rules choose. Raises PlanError for a source that is not possible."""
        return tuple(self._feature(tap, rules) for tap in self.taps)

    def _feature(self, tap: Tap, rules: Rules) -> Feature:
        made_in = self.maker(tap)
        state: State = "past" if made_in < self.index else "own" if made_in == self.index else "future"
        if tap.node.op == "placeholder" or not isinstance(tap.node.meta["value"], Tensor):
            return Feature(tap.name, "cache")
        source = rules.source(feature_info(self.structure, tap.node, tap.name), self.info, state)
        if state == "future" and source != "synthesised":
            raise PlanError(f"rules.source: '{tap.name}' does not exist yet at '{self.unit.name}', so it can only be "
                            f"'synthesised', not {source!r}")
        return Feature(tap.name, source)


LevelsRule = Callable[[FeatureInfo, Sequence[FeatureInfo]], Sequence[int]]


def remainder_of(
    structure: Structure, task: Task, unit: Unit, cuts: Sequence[Unit], choose: LevelsRule, rules: Rules,
    planned: tuple[tuple[int, ...], tuple[float, ...]] | None = None, ahead: int = 0,
) -> Remainder:
    """The remainder behind ``unit``, one of ``cuts``, or behind the last of the ``ahead`` blocks that follow it, which
    are then taken for a part of the local module.

    choose: which output levels its loss is computed on, of the module and the levels; rules: their weights; planned:
    levels and weights that are decided already. Raises PlanError for levels that the network does not have, and where
    not so many blocks follow.
    """
    index = [cut.end for cut in cuts].index(unit.end)
    place = {node: position for position, node in enumerate(structure.chain)}
    end = blocks_ahead(structure, unit, ahead)[-1] if ahead else unit
    ends = [cut.end for cut in cuts[:index]] + [end.end] + [
        cut.end for cut in cuts if place[cut.end] > place[end.end]]
    nodes = levels_of(structure, task)
    levels: tuple[int, ...] = ()
    sigma: tuple[float, ...] = ()
    if nodes is not None:
        module = feature_info(structure, end.end, end.name)
        infos = [feature_info(structure, node, str(key)) for key, node in nodes.items()]
        levels = planned[0] if planned else tuple(choose(module, infos))
        check_levels(levels, module, infos)
        sigma = planned[1] if planned else tuple(rules.sigma(module, infos[index]) for index in levels)
    return Remainder(structure, task, end, index, structure.assign(ends), levels, sigma, len(cuts))


def blocks_ahead(structure: Structure, unit: Unit, count: int) -> list[Unit]:
    """The next blocks behind a unit. Raises PlanError where they reach the trunk's end, behind which stand neck and
    head alone."""
    place = {node: position for position, node in enumerate(structure.chain)}
    later = [other for other in structure.units if place[other.end] > place[unit.end]]
    if len(later) <= count:
        raise PlanError(f"ahead={count}: behind '{unit.name}' {len(later)} blocks follow, and the last of them belongs "
                        f"to neck and head. Cut earlier, or choose ahead={max(0, len(later) - 1)}.")
    return later[:count]


def check_levels(levels: Sequence[int], module: FeatureInfo, known: Sequence[FeatureInfo]) -> None:
    """Raise PlanError for levels that the network does not have, or none."""
    if not levels or any(not 0 <= index < len(known) for index in levels):
        raise PlanError(f"rules.levels must keep some of {len(known)} levels, not {tuple(levels)!r} (module "
                        f"'{module.module}')")


def feature_info(structure: Structure, node: fx.Node, name: str) -> FeatureInfo:
    """A recorded value as rules see it."""
    return FeatureInfo(name, structure.stride(node), structure.channels(node))


def levels_of(structure: Structure, task: Task) -> dict[Any, fx.Node] | None:
    """The network's output levels by key, where the task's head reads levels."""
    outputs = structure.trace.output.args[0]
    if not task.outputs_are_levels:
        return None
    if isinstance(outputs, fx.Node):
        outputs = {"0": outputs}
    if not isinstance(outputs, dict):
        raise PlanError(f"task '{task.name}' expects a dict of feature maps from the backbone")
    return dict(outputs)


def image_size(structure: Structure) -> tuple[int, int]:
    """Height and width of the example images, in pixels."""
    *_, height, width = (1, 1, *structure.spatial(structure.chain[0]))
    return height, width
