"""Passes 4 and 5 for one local module: select its features, draft or build its auxiliary network, say what it costs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from glcan_fx.auxiliary.builder import Auxiliary, Options
from glcan_fx.auxiliary.features import Feature, Place, State
from glcan_fx.auxiliary.synthesize import predictors_of, readable, reads, synthesize
from glcan_fx.auxiliary.tails import tail_of
from glcan_fx.errors import PlanError
from glcan_fx.layers import Cost, weights_in
from glcan_fx.plans.plan import Block, LocalModule
from glcan_fx.structure.influence import reads_some
from glcan_fx.structure.nodes import is_size
from glcan_fx.structure.structure import Structure, Tap, Unit, multiply_adds
from glcan_fx.tasks import Task


class Drafts:
    """What local modules would be, and would cost; the same draft is not made twice."""

    def __init__(self, structure: Structure, model: nn.Module, task: Task) -> None:
        self.structure, self.model, self.task = structure, model, task
        self._costs: dict[Any, Cost] = {}
        self._units: dict[tuple[str, Options], Cost] = {}
        self._steps: dict[tuple[fx.Node, ...], float] = {}

    def module(self, unit: Unit, cuts: Sequence[Unit], options: Options) -> LocalModule:
        """The local module that ends with ``unit``, one of ``cuts``."""
        return local_module(self.structure, self.model, self.task, options, unit, cuts, sizes=self._costs)[0]

    def counted_once(self, modules: Sequence[LocalModule], cuts: Sequence[Unit], options: Options) -> list[LocalModule]:
        """The same local modules, but a shared predictor's parameters count for the first one that has it, and the
        model's own predictors for none. Raises PlanError where no auxiliary network has those."""
        seen: set[Any] = set()
        found = []
        for unit, module in zip(cuts, modules, strict=True):
            _, auxiliary, request = local_module(self.structure, self.model, self.task, options, unit, cuts)
            assert auxiliary is not None
            if options.predictors == "model":
                read = [path for path, _ in readable(self.structure, auxiliary)]
                fewer = sum(weights_in(auxiliary.network.get_submodule(path)) for path in dict.fromkeys(read))
                found.append(replace(module, aux_parameters=module.aux_parameters - fewer))
                continue
            sizes: dict[Any, int] = {str(request): self.task.head_cost(self.model, **request).parameters}
            for key, path in [] if self.task.outputs_are_levels else predictors_of(auxiliary, module.levels):
                sizes[key] = weights_in(auxiliary.network.get_submodule(path))
            again = sum(size for key, size in sizes.items() if key in seen)
            found.append(replace(module, aux_parameters=module.aux_parameters - again))
            seen |= sizes.keys()
        if options.predictors == "model" and modules and found == modules:
            raise PlanError("predictors='model': no auxiliary network ends with a layer of the shape of the model's "
                            "last one. Leave it out, or make them wider: aux_width=1, head='light'.")
        return found

    def last(self, cuts: Sequence[Unit]) -> LocalModule:
        """The last local module."""
        return last_module(self.structure, self.model, self.task, cuts, self.tail)

    def cost(self, unit: Unit, options: Options) -> Cost:
        """What the auxiliary network of a module that ends with ``unit`` costs."""
        key = unit.name, options
        if key not in self._units:
            cuts = self.structure.units[:-1]
            made = self.module(unit, cuts if unit in cuts else [unit], options)
            self._units[key] = Cost(made.aux_parameters, made.aux_saved, made.aux_flops)
        return self._units[key]

    @cached_property
    def tail(self) -> Cost:
        """What the task's head costs the last module."""
        return tail_cost(self.structure, self.model, self.task)

    def step(self, cuts: Sequence[Unit] = ()) -> float:
        """Floating-point operations of a training step without auxiliary networks; without cuts backpropagation's.

        Forward, and as much for the gradients of a layer's weights and of its input. Frozen layers have none of their
        weights, and no gradient is needed of what no trained layer of the same local module has made.
        """
        ends = tuple(unit.end for unit in cuts)
        if ends not in self._steps:
            owner = self.structure.assign(ends)
            total, trained = 3.0 * self.tail.flops, set[fx.Node]()
            for node in self.structure.trace.graph.nodes:
                passes = any(source in trained and owner.get(source) == owner.get(node)
                             for source in node.all_input_nodes)
                trains = any(p.requires_grad for p in self.structure.trace.parameters(node))
                if passes or trains:
                    trained.add(node)
                total += 2 * (1 + passes + trains) * multiply_adds(self.structure, [node])
            self._steps[ends] = max(1.0, total)
        return self._steps[ends]

    def extra(self, cuts: Sequence[Unit], options: Options) -> float:
        """Compute of a training step beyond backpropagation's, relative to it: what auxiliary networks take (backward
        is twice forward), less the gradients that no longer pass a cut."""
        auxiliary = 3 * sum(self.cost(unit, options).flops for unit in cuts)
        return (auxiliary + self.step(cuts)) / self.step() - 1

    def weight(self, cuts: Sequence[Unit], options: Options) -> float:
        """Memory of the auxiliary networks' weights, with gradients and momentum, relative to backpropagation's."""
        each = 3 * max((p.element_size() for p in self.structure.trace.shadow.parameters()), default=4)
        parameters, saved, _ = self.structure.uses([])[0]
        return (each * sum(self.cost(unit, options).parameters for unit in cuts)
                / max(1, each * parameters + saved + self.tail.saved))

    def refused(self, options: Options) -> dict[str, PlanError]:
        """Units behind which no auxiliary network can be built, and why."""
        refused: dict[str, PlanError] = {}
        for unit in self.structure.units[:-1]:
            try:
                self.cost(unit, options)
            except PlanError as error:
                refused[unit.name] = error
        return refused


def _place(structure: Structure, node: fx.Node, name: str) -> Place:
    return Place(name, structure.stride(node), structure.channels(node))


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


def local_module(
    structure: Structure, model: nn.Module, task: Task, options: Options, unit: Unit, cuts: Sequence[Unit],
    real: LocalModule | None = None, sizes: dict[Any, Cost] | None = None, draft: bool = False,
) -> tuple[LocalModule, Auxiliary | None, dict[str, Any]]:
    """Select the features of the module that ends with ``unit`` and build its auxiliary network: real, or a draft.

    ``real`` is the module as planned; without it the module is planned, with a draft.
    ``sizes`` remembers what drafts cost, by what that depends on; a known one is not built again. ``draft``: build the
    planned module's on fake tensors.
    """
    index = [cut.end for cut in cuts].index(unit.end)
    owner = structure.assign([cut.end for cut in cuts])
    place = _place(structure, unit.end, unit.name)
    levels = levels_of(structure, task)
    keys, sigma = list(levels or {}), {}
    if levels is not None:
        places = [_place(structure, node, str(key)) for key, node in levels.items()]
        kept = real.levels if real else tuple(task.rules.levels(place, places))
        if not kept or any(not 0 <= i < len(keys) for i in kept):
            raise PlanError(f"rules.levels must keep some of {len(keys)} levels, not {kept!r} (module '{unit.name}')")
        if not real:
            least = place.stride if options.method == "dgl" else options.stride
            coarse = tuple(i for i in kept if places[i].stride >= least)
            kept = (coarse[:1] if options.method == "dgl" else coarse) or kept[-1:]
        weights = real.sigma if real else tuple(task.rules.sigma(place, places[i]) for i in kept)
        sigma = {keys[i]: weight for i, weight in zip(kept, weights, strict=True)}
        keys = [keys[i] for i in kept]
    else:
        kept = weights = ()

    def select(outputs: Any) -> Any:
        return outputs if levels is None else {key: levels[key] for key in keys}

    tail = tail_of(structure, select(structure.trace.output.args[0]))
    inside = {*tail.nodes, structure.trace.output}
    taps = {tap for tap in tail.taps  # whose values are read, not their sizes alone
            if any(user in inside and not is_size(user) for user in tap.users)}
    if real and (real.stride, real.channels) != (place.stride, place.channels):
        raise PlanError(f"the plan's module '{real.name}' ends with {real.channels} channels at stride {real.stride}, "
                        f"but in this {type(model).__name__} it has {place.channels} at stride {place.stride}: the "
                        "plan was made for another model. Plan again.")
    selected = tuple(_feature(structure, task, tap, place, owner, index) for tap in structure.taps
                     if tap.node in taps and options.method == "glcan")
    selected = reads(structure, unit.end, tail, selected, options, not task.outputs_are_levels)
    features = real.features if real else selected
    if real:
        expected = {feature.tap for feature in selected}
        if {feature.tap for feature in features} != expected:
            raise PlanError(f"the plan's module '{real.name}' reads {', '.join(f.tap for f in features)}, but this "
                            f"{type(model).__name__} has other features: it was made for another model. Plan again.")
        for given in features:
            tap = next(tap for tap in structure.taps if tap.name == given.tap)
            module = _maker(tap, owner)
            if given.source != "synthesised" and (module > index or given.source == "own" and module < index):
                when, instead = ("later", "synthesised") if module > index else ("earlier", "cache")
                raise PlanError(f"the plan's module '{real.name}' cannot take '{given.tap}' as {given.source!r}: it is "
                                f"made {when}. Use {instead!r}.")
    key = (structure.shape(unit.end), unit.end in structure.channels_last, features, kept, options,
           reads_some(structure, unit.end))
    alike = options.depth == 0 and len(structure.shape(unit.end)) > 2  # else it depends on the units that are left
    known = sizes.get(key) if sizes is not None and alike else None
    auxiliary = None if known else synthesize(
        structure, None if draft or not real else model, unit.end, features, options, select=select, sigma=sigma,
        outputs_are_predictions=not task.outputs_are_levels,
    )
    request: dict[str, Any] = {}
    if auxiliary is not None:
        source = {name: node.meta["value"] for name, node in select(None).items()} if levels is not None else None
        request = {"outputs": auxiliary.outputs, "source": source, "levels": kept, "style": options.head,
                   "width": options.width, "image": _image(structure)}
        known = auxiliary.cost + task.head_cost(model, **request)
        if sizes is not None:
            sizes[key] = known
    assert known is not None
    parameters, saved, _ = structure.uses([cut.end for cut in cuts])[index]
    info = LocalModule(
        **_extent(structure, cuts, index), cut=unit.name, parameters=parameters, aux_parameters=known.parameters,
        saved=saved, aux_saved=known.saved, aux_flops=known.flops, features=features, levels=tuple(kept),
        sigma=tuple(weights), recompute=real is not None and real.recompute,
    )
    return info, auxiliary, request


def _maker(tap: Tap, owner: dict[fx.Node, int]) -> int:
    """The local module that makes a tap; -1 for an input."""
    return -1 if tap.node.op == "placeholder" else owner[tap.node]


def _feature(
    structure: Structure, task: Task, tap: Tap, place: Place, owner: dict[fx.Node, int], index: int
) -> Feature:
    module = _maker(tap, owner)
    state: State = "past" if module < index else "own" if module == index else "future"
    if tap.node.op == "placeholder" or not isinstance(tap.node.meta["value"], Tensor):
        return Feature(tap.name, "cache")
    source = task.rules.source(_place(structure, tap.node, tap.name), place, state)
    if state == "future" and source != "synthesised":
        raise PlanError(f"rules.source: '{tap.name}' does not exist yet at '{place.name}', so it can only be "
                        f"'synthesised', not {source!r}")
    return Feature(tap.name, source)


def _image(structure: Structure) -> tuple[int, int]:
    """Height and width of the example images."""
    *_, height, width = (1, 1, *structure.spatial(structure.chain[0]))
    return height, width


def tail_cost(structure: Structure, model: nn.Module, task: Task) -> Cost:
    """Of the head that the task puts on the last module."""
    levels = levels_of(structure, task)
    if levels is None:
        return Cost()
    values = {key: node.meta["value"] for key, node in levels.items()}
    return task.head_cost(model, values, values, tuple(range(len(values))), "full", 1.0, _image(structure))


def last_module(structure: Structure, model: nn.Module, task: Task, cuts: Sequence[Unit], tail: Cost) -> LocalModule:
    """The last local module, with the model's own neck and head."""
    ends = [cut.end for cut in cuts]
    owner = structure.assign(ends)
    features = tuple(Feature(tap.name, "own" if owner.get(tap.node) == len(cuts) else "cache")
                     for tap in structure.taps if any(not is_size(user) for user in tap.node.users
                                                      if owner.get(user, len(cuts)) == len(cuts)))
    parameters, saved, _ = structure.uses(ends)[-1]
    traced = {id(p) for node in structure.trace.graph.nodes for p in structure.trace.parameters(node)}
    rest = sum(p.numel() for p in structure.trace.shadow.parameters() if id(p) not in traced)
    return LocalModule(
        **_extent(structure, cuts, len(cuts)), cut=None, parameters=parameters + rest, aux_parameters=0,
        saved=saved + tail.saved, aux_saved=0, aux_flops=0, features=features, levels=(), sigma=(),
    )


def _extent(structure: Structure, cuts: Sequence[Unit], index: int) -> dict[str, Any]:
    """What a local module is made of, and where it ends."""
    order = {node: position for position, node in enumerate(structure.chain)}
    ends = [-1, *(order[cut.end] for cut in cuts), len(structure.chain)]
    uses = structure.uses([unit.end for unit in structure.units])
    blocks = tuple(
        Block(unit.name, structure.shape(unit.end), structure.stride(unit.end), structure.channels(unit.end),
              used.parameters, used.saved)
        for unit, used in zip(structure.units, uses, strict=False)
        if ends[index] < order[unit.end] <= ends[index + 1])
    end = cuts[index].end if index < len(cuts) else structure.chain[-1]
    owner = structure.assign([cut.end for cut in cuts])
    makes = tuple(tap.name for tap in structure.taps if tap.node.op != "placeholder" and owner.get(tap.node) == index)
    names = [block.name for block in blocks] or [cuts[index].name if index < len(cuts) else "tail"]
    return {"name": names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}", "blocks": blocks,
            "makes": makes, "shape": structure.shape(end), "stride": structure.stride(end),
            "channels": structure.channels(end)}
