"""The Plan: every decision of the compiler as plain data."""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import fx, nn

from glcan_fx.auxiliary.builder import Options
from glcan_fx.auxiliary.features import Feature
from glcan_fx.capture.replay import Segments, Surroundings
from glcan_fx.capture.source_lines import Opaque, Specialisation
from glcan_fx.capture.trace import Report
from glcan_fx.errors import PlanError
from glcan_fx.files import write
from glcan_fx.report.dot import PICTURES, picture, plan_dot
from glcan_fx.report.page import plan_fragment, plan_report
from glcan_fx.report.table import plan_text
from glcan_fx.simulate.estimate import Estimate, Memory, OptimizerLike, Phase
from glcan_fx.tasks import Spec, Task
from glcan_fx.tasks.base import Criterion

if TYPE_CHECKING:
    from glcan_fx.step.local_model import LocalModel

_VERSION = 4


@dataclass(frozen=True)
class Block:
    """A block of the trunk, the smallest part that may become a local module: its module path, the value that it hands
    on, its own parameters, and the bytes that it keeps for backward at the example size."""

    name: str
    shape: tuple[int, ...]
    stride: int
    channels: int
    parameters: int
    saved: int


@dataclass(frozen=True)
class LocalModule:
    """One gradient-isolated local module, as planned.

    cut: the split point that it ends with (None: the last, which owns neck and head). blocks: what it is made of, neck
    and head aside. shape, stride, channels: of the value that it hands on; of the last module, of the trunk's end.
    makes: the taps (what neck and head read) that are made in it, and go to the cache where a later module reads them.
    parameters: a parameter that several modules use is counted in the first of them. features: V_m, the taps its loss
    reads, those of the last module's neck and head included. levels: output levels kept, sigma: their weights (eq. 8);
    both empty where the network has no levels. saved, aux_saved: bytes kept for backward at the example size by the
    module and by its auxiliary network, which takes aux_flops floating-point operations forward. recompute: its blocks
    keep nothing but their inputs and run again in backward.
    """

    name: str
    cut: str | None
    blocks: tuple[Block, ...]
    shape: tuple[int, ...]
    stride: int
    channels: int
    makes: tuple[str, ...]
    parameters: int
    aux_parameters: int
    saved: int
    aux_saved: int
    aux_flops: int
    features: tuple[Feature, ...]
    levels: tuple[int, ...]
    sigma: tuple[float, ...]
    recompute: bool = False

    def headline(self, index: int) -> str:
        """What the generated code says above this module's lines."""
        parts = [f"local module {index}: {self.name}"]
        if self.stride:
            parts.append(f"stride {self.stride}, {self.channels} channels")
        for source, label in (("cache", "P"), ("own", "own"), ("synthesised", "S")):
            names = [feature.tap for feature in self.features if feature.source == source]
            if names:
                parts.append(f"{label}: {', '.join(names)}")
        return " | ".join(parts) if self.cut else f"{parts[0]}, neck and head"


@dataclass(frozen=True)
class Plan:
    """What ``transform`` will do, before anything is built. Prints as a table; edit with ``dataclasses.replace``.

    natural: the finest split points. inputs: sizes of the example inputs of the compiled part (``network``), positional
    or by name. report: how it was captured. around: what runs as Python around the compiled part, where the whole
    model could not be captured. optimizer: that ``memory`` is for.
    """

    model: str
    task: str
    network: str
    modules: tuple[LocalModule, ...]
    natural: tuple[str, ...]
    inputs: tuple[Any, ...] | dict[str, Any]
    options: Options
    notes: tuple[str, ...] = ()
    report: Report = Report()
    around: Surroundings | Segments | None = None
    optimizer: str | None = "sgd"
    reads: tuple[tuple[str | None, ...], ...] = dataclasses.field(default=(), compare=False, repr=False)
    task_object: Task | None = dataclasses.field(default=None, compare=False, repr=False)
    draft: "Draft | None" = dataclasses.field(default=None, compare=False, repr=False)

    @functools.cached_property
    def memory(self) -> Memory:
        """Simulated memory and compute of a training step with the plan's optimiser: of this plan, of backpropagation,
        and of backpropagation with every block recomputed (activation checkpointing). Takes seconds, once.

        Raises PlanError where it cannot be simulated: for a plan read from JSON before it is applied, for a model that
        runs as Python (rung 5).
        """
        return self.estimate(self.optimizer)

    def estimate(self, optimizer: OptimizerLike = "sgd", *, in_forward: bool = False) -> Memory:
        """As ``memory``, with another optimiser: "sgd", "adam", a function of the parameters, or None; in_forward: the
        plan's step with ``optimizer_in_forward``."""
        return self.known.memory(self, optimizer, in_forward)

    @property
    def known(self) -> "Draft":
        """What planning knows of the model. Raises PlanError where the plan does not have it."""
        if self.draft is None:
            reason = ("its local modules run as Python" if isinstance(self.around, Segments) else
                      "it was read from JSON, or copied: apply it, and ask the compiled model's plan")
            raise PlanError(f"this plan does not know its model: {reason}.")
        return self.draft

    @property
    def k(self) -> int:
        """Number of local modules."""
        return len(self.modules)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The split points, in order."""
        return tuple(module.cut for module in self.modules if module.cut is not None)

    def apply(
        self, model: nn.Module, *, task: str | Task | None = None, criterion: Criterion | None = None,
        verify: bool = True,
    ) -> "LocalModel":
        """Build the compiled module; it shares the model's parameters, and the model itself is left as it is.

        ``task`` or ``criterion`` are needed for a plan from JSON whose task is not one of the built-in ones.
        ``verify``: see ``transform``. Raises PlanError where the plan does not fit the model.
        """
        from glcan_fx.api import apply  # the one import that points up: a plan is data, applying it is the compiler's

        return apply(self, model, task, criterion, verify)

    def to_json(self) -> str:
        """The plan as JSON text (format version 4), with its simulated memory; ``from_json`` reads it back."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del data["task_object"], data["draft"], data["reads"]
        try:
            data["memory"] = {name: e and {**vars(e), "live": ()} for name, e in vars(self.memory).items()}
            data["memory_of"] = _decisions(json.loads(json.dumps(data, default=_plain)))
        except PlanError:
            data["memory"] = None
        return json.dumps({"format": "glcan_fx.plan", "version": _VERSION, **data}, indent=1, default=_plain)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read ``to_json``'s text. Raises PlanError for text that is none."""
        try:
            data = json.loads(text)
            if data.pop("format") != "glcan_fx.plan" or data.pop("version") != _VERSION:
                raise PlanError(f"this is no plan of format version {_VERSION}: make it again with glcan_fx.plan()")
            decisions = _decisions(data)
            data["modules"] = tuple(_module_from(item) for item in data["modules"])
            data["options"] = Options(**data["options"])
            if not isinstance(data["inputs"], list | dict):
                raise PlanError("this is no plan in JSON: its inputs are neither a list nor named")
            data["inputs"] = _specs_from(data["inputs"])
            data["report"] = Report(
                data["report"]["rung"], tuple(Specialisation(**s) for s in data["report"]["specialisations"]),
                tuple(Opaque(**o) for o in data["report"]["opaque"]), tuple(data["report"]["lost"]))
            if data["around"] is not None:
                kind: Any = Segments if "paths" in data["around"] else Surroundings
                data["around"] = kind(*map(_tuples, data["around"].values()))
            data["natural"], data["notes"] = tuple(data["natural"]), tuple(data["notes"])
            memory, memory_of = data.pop("memory"), data.pop("memory_of", None)
            made = cls(**data)
            if memory is not None and memory_of == decisions:  # else it was edited
                estimates: Any = {name: e and Estimate(**{**e, "timeline": tuple(Phase(*p) for p in e["timeline"]),
                                                  "kept": _tuples(e["kept"])})
                                  for name, e in memory.items()}
                made.__dict__["memory"] = Memory(**estimates)
            return made
        except KeyError as error:
            raise PlanError(f"this is no plan in JSON, or not all of one: it has no {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            said = str(error).replace(".__init__() got an unexpected keyword argument", " has nothing called")
            raise PlanError(f"this is no plan in JSON, or was edited wrongly: {said}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "draft": None}

    def __str__(self) -> str:
        return plan_text(self)

    def to_dot(self, depth: str | None = None) -> str:
        """The partition graph in Graphviz's DOT language. depth: "stages" (local modules that are alike as one),
        "modules", "blocks" or "operators" (needs the model); None: stages for more than 20 local modules, else modules.
        """
        return plan_dot(self, depth)

    def to_html(self, depth: str | None = None) -> str:
        """A report as one HTML page, which needs nothing else: the graph, memory over a step, the table, the code."""
        return plan_report(self, depth)

    def save(self, path: str | Path, *, depth: str | None = None) -> None:
        """Write the plan, as the file's ending says: .html (``to_html``), .json (``to_json``), .txt (the table), .dot,
        or a picture, .svg, .png or .pdf, for which Graphviz's program ``dot`` must be installed.

        Raises PlanError for another ending, UnsupportedError where ``dot`` is missing. A file that was there stays
        as it was where writing fails.
        """
        path = Path(path)
        texts: dict[str, Callable[[], str]] = {
            ".html": lambda: self.to_html(depth), ".json": self.to_json, ".txt": lambda: f"{self}\n",
            ".dot": lambda: self.to_dot(depth)}
        ending = path.suffix.lower()
        if ending not in (*texts, *PICTURES):
            raise PlanError(f"'{path}': a file that ends in {', '.join((*texts, *PICTURES))}")
        made = picture(self, ending, depth) if ending in PICTURES else texts[ending]().encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, made)

    def _repr_html_(self) -> str:
        """For notebooks: the table, and the picture where Graphviz's program ``dot`` is installed."""
        return plan_fragment(self)


class Draft(Protocol):
    """What planning knows of the model, and a plan does not say."""

    def memory(self, plan: Plan, optimizer: OptimizerLike, in_forward: bool = False) -> Memory: ...

    def simulate(self, plan: Plan, optimizer: OptimizerLike, in_forward: bool = False) -> Estimate: ...

    def backpropagation(self, optimizer: OptimizerLike, *, recompute: bool = False) -> Estimate: ...

    def shadow(self) -> nn.Module: ...

    def operators(self, plan: Plan) -> tuple[dict[fx.Node, int], list[fx.Node]]: ...

    def local(self, plan: Plan) -> "LocalModel": ...

    @property
    def inputs(self) -> list[Any]: ...

    @property
    def targets(self) -> Any: ...

    @property
    def loss(self) -> Task: ...

    @property
    def blocks(self) -> tuple[dict[str, str], list[str]]: ...


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return {"shape": list(value.shape), "dtype": value.dtype}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} is no plain data")


def _decisions(data: dict[str, Any]) -> list[Any]:
    """What the memory of a plan in JSON depends on, of what may be edited."""
    kept = ("cut", "features", "levels", "sigma", "recompute")
    return [[{key: module[key] for key in kept} for module in data["modules"]], data["options"], data["optimizer"]]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _module_from(item: dict[str, Any]) -> LocalModule:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in item.items()}
    values["features"] = tuple(Feature(**feature) for feature in item["features"])
    values["blocks"] = tuple(Block(**{**block, "shape": tuple(block["shape"])}) for block in item["blocks"])
    return LocalModule(**values)


def _specs_from(item: Any) -> Any:
    if isinstance(item, dict) and set(item) == {"shape", "dtype"}:
        return Spec(tuple(item["shape"]), item["dtype"])
    if isinstance(item, dict):
        return {key: _specs_from(part) for key, part in item.items()}
    return tuple(_specs_from(part) for part in item) if isinstance(item, list) else item
