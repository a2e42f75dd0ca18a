"""What a task says: which part of the model is compiled, how a training step begins, and what its loss is."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from glcan_fx.errors import CriterionError, PlanError, TargetError
from glcan_fx.layers import Cost
from glcan_fx.pytree import map_tensors, tensors_in
from glcan_fx.tasks import criteria

Criterion = Callable[[Any, Any], Tensor | dict[str, Tensor]]


class Task(ABC):
    """A training task: ``loss(outputs, targets)`` on the model's own outputs. Subclass it for a task of your own.

        class Denoising(glcan_fx.Task):
            name = "denoising"

            def loss(self, outputs, targets):
                return torch.nn.functional.mse_loss(outputs, targets)

        local = glcan_fx.transform(model, task=Denoising(), example_inputs=torch.empty(2, 3, 64, 64))

    A training step is then ``local(*inputs, targets)`` and returns ``LocalOutput(loss, output, losses)``.
    """

    name: str = "custom"
    network_is_part = False  # whether the compiled part is a sub-module
    outputs_are_levels = False  # whether the compiled part returns feature maps that a head reads
    takes_targets = True  # whether a training step has targets, beside the model's own arguments

    def begin(self, model: nn.Module) -> None:  # noqa: B027 - nothing to forget by default
        """Called before a model is planned, or a plan applied: forget what was kept of it."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor | dict[str, Tensor]:
        """The loss of the model's outputs: a scalar, or a dict: its "loss", or else the sum of the entries that have a
        gradient, is minimised. A function of outputs and targets alone: it is called once for each local module."""

    def network(self, model: nn.Module) -> str:
        """Path of the sub-module that is compiled; "" is the whole model."""
        if isinstance(getattr(model, "transform", None), nn.Module) and hasattr(model, "backbone"):
            raise PlanError(f"{type(model).__name__} is a detector that computes its own losses: use task='detection'")
        if self.takes_targets and "targets" in inspect.signature(model.forward).parameters:
            raise PlanError("the model's forward has an argument called 'targets', the name that the compiled module "
                            "uses for the labels of a training step: rename the argument.")
        return ""

    def example_inputs(self, model: nn.Module, given: Any) -> tuple[Any, ...] | dict[str, Any]:
        """Arguments of the compiled part. ``given``: the user's example_inputs, a tensor, a tuple, or a dict of keyword
        arguments."""
        if given is None:
            raise PlanError(
                f"task '{self.name}' needs example_inputs=: one batch of the model's inputs, as a tensor or a tuple "
                "of tensors, as large as those that you train with (values do not matter), for example "
                "torch.empty(32, 3, 224, 224)."
            )
        return given if isinstance(given, dict) else tuple(given) if isinstance(given, tuple | list) else (given,)

    def fits(self, outputs: Any) -> None:  # noqa: B027 - any outputs do by default
        """Raise PlanError where the loss can make nothing of such outputs, which are fake example values."""

    def example_targets(self, model: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Targets to simulate a step with; None where they are not known.

        inputs: ``Spec``s of the model's example inputs; outputs: fake example values of the compiled part's outputs.
        """
        return None

    def modules(self) -> dict[str, nn.Module]:
        """Modules that belong to the task and have parameters of their own (a learned criterion)."""
        return {}

    def prepare(self, graph: fx.Graph, placeholders: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """Emit the start of a training step: returns the compiled part's inputs and the context of the losses."""
        inputs = [graph.placeholder(str(node.target), default_value=node.args[0]) if node.args
                  else graph.placeholder(str(node.target)) for node in placeholders]
        return inputs, [graph.placeholder("targets", default_value=None)] if self.takes_targets else []

    def divided(self, context: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The context of a loss without the targets, which end it, and the targets, if a step has some."""
        count = len(context) - self.takes_targets
        return context[:count], context[count:]

    def check(self, inputs: Any, targets: Any) -> None:
        """Raise TargetError when a training step cannot work with these targets."""
        if targets is None and self.takes_targets:
            raise TargetError(
                "a training step needs targets: call local(inputs, targets) while local.training is True, or "
                "local.eval() first to predict."
            )

    def head(
        self, model: nn.Module, outputs: Any, source: Any, levels: Sequence[int], style: str, width: float,
        image: tuple[int, int],
    ) -> nn.Module:
        """The module (outputs, *context) -> loss of a local module.

        outputs, source: fake example values of the auxiliary network's outputs and of the compiled part's own, both
        restricted to ``levels``; style, width: a method's ``head`` and ``width``; image: height and width of the
        example in pixels.
        """
        return LossHead(self, repeated=True)

    def head_cost(
        self, model: nn.Module, outputs: Any, source: Any, levels: Sequence[int], style: str, width: float,
        image: tuple[int, int],
    ) -> Cost:
        """What ``head`` costs at the example size."""
        return Cost()

    def last_head(self, model: nn.Module, fused: bool = False) -> nn.Module:
        """The module (outputs, *context) -> loss of the last local module, on the model's own head; ``fused``: with
        losses that compute the same in less memory, where the task has some."""
        return LossHead(self)

    def behind(self, model: nn.Module) -> list[str]:
        """Names of the model's own modules and parameters beside the compiled part, which its head may use."""
        return [name for name in [*model._modules, *model._parameters] if name != self.network(model)]

    def fuses_losses(self, model: nn.Module) -> bool:
        """Whether ``last_head(fused=True)`` computes a loss in less memory."""
        return False

    def averages_images(self, model: nn.Module, levels: Any) -> bool:
        """Whether the loss of a batch is the mean of the losses of its images, so that it may be computed in slices.

        levels: the compiled part's output nodes by level, where it has levels.
        """
        return False

    def part(self, value: Any, start: int, stop: int, images: int) -> Any:
        """Images ``start`` to ``stop`` of a batch's nested value: rows of tensors, items of lists, of that length."""
        if isinstance(value, Tensor):
            return value[start:stop] if value.dim() and value.shape[0] == images else value
        if isinstance(value, list) and len(value) == images and not any(
                isinstance(item, Tensor) and item.dim() and item.shape[0] == images for item in value):
            return value[start:stop]
        if isinstance(value, list | tuple):
            made = [self.part(item, start, stop, images) for item in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        if isinstance(value, dict):
            return {key: self.part(item, start, stop, images) for key, item in value.items()}
        return value

    def finish(self, graph: fx.Graph, result: Any, context: list[fx.Node]) -> tuple[Any, list[fx.Node]]:
        """Emit what follows the compiled part: returns the model's outputs and the context of the last loss."""
        return result, context

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """Modules that ``prepare`` and ``finish`` call as ``aux.<name>``; they register nothing of the model."""
        return {}

    def result(self) -> str:
        """"output": a LocalOutput; "dict": the detector's dict of losses."""
        return "output"


class LossHead(nn.Module):
    """Calls the task's loss; has no parameters: those of a criterion are registered once, under ``aux.``.

    repeated: the loss is called for other local modules in the same step, too.
    """

    def __init__(self, task: Task, *, repeated: bool = False) -> None:
        super().__init__()
        self.repeated = repeated
        self.looks = 3  # first calls that are looked at closely
        self.__dict__["task"] = task  # copied with this module, so that a copy calls its own criterion

    def forward(self, outputs: Any, targets: Any = None) -> Any:
        task = self.__dict__["task"]
        if torch.compiler.is_compiling():
            return task.loss(outputs, targets)
        before = criteria.state_of(targets) if self.repeated else None
        looks = self.looks > 0 and not any(isinstance(tensor, FakeTensor) for tensor in tensors_in(outputs))
        state = criteria.moving_state(_owners(task)) if looks and self.repeated else None
        try:
            loss = task.loss(outputs, targets)
        except Exception as error:
            error.add_note(f"glcan_fx: in the loss of task '{task.name}', with outputs {specs(outputs)} and targets "
                           f"{specs(targets)}")
            raise
        if before is not None:
            criteria.refuse_edits(before, targets)
        if looks:
            self.looks -= 1
            criteria.check_total(loss)
            criteria.check_device(loss, outputs)
        if state is not None and not vars(task).get("_moves"):
            vars(task)["_moves"] = criteria.warn_of_state(state, criteria.moving_state(_owners(task)))
        return _told_apart(task, loss, outputs, targets)


def _owners(task: Task) -> list[Any]:
    """Where a task may keep state that moves when its loss is called."""
    criterion = getattr(task, "criterion", None)
    plain = [] if isinstance(criterion, nn.Module) else [getattr(criterion, "__self__", criterion)]
    return [*task.modules().values(), *plain, task]


def _told_apart(task: Task, loss: Any, outputs: Any, targets: Any) -> Any:
    """A loss of named values with the names of those that are minimised, where these are not all.

    They are told by their gradients. Where there are none (evaluation, a frozen module), the names are known from other
    calls; else the loss is computed once more with gradients.
    """
    entries = None if isinstance(loss, Tensor) else criteria.entries_of(loss)
    tensors = [name for name, value in (entries or {}).items() if isinstance(value, Tensor)]
    if entries is None or len(tensors) < 2:
        return loss
    known: dict[tuple[str, ...], list[str]] = vars(task).setdefault("_counted", {})
    if any(entries[name].requires_grad for name in tensors):
        counted = criteria.counted_in(entries)
        known[tuple(entries)] = counted
    else:
        counted = known.get(tuple(entries)) or [
            name for name in criteria.counted_in(_with_gradients(task, outputs, targets)) if name in entries]
        known[tuple(entries)] = counted
    if isinstance(loss, dict) and counted == list(entries) == list(loss):
        return loss
    return criteria.Parts({name: value.detach() if isinstance(value, Tensor) and name not in counted else value
                           for name, value in entries.items()}, counted)


def _with_gradients(task: Task, outputs: Any, targets: Any) -> dict[str, Any]:
    """The entries of a loss, computed with gradients of the outputs."""
    devices = sorted({tensor.get_device() for tensor in tensors_in(outputs) if tensor.is_cuda})
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=devices):
        leaves = map_tensors(outputs, lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))
        return criteria.entries_of(task.loss(leaves, map_tensors(targets, Tensor.clone))) or {}


def _dimensions(task: Task, built_in: type[Task], outputs: Any, allowed: Sequence[int], expected: str) -> None:
    """Raise PlanError where the network's main output has none of the ``allowed`` numbers of dimensions, and the loss
    is still the built-in one."""
    if type(task).loss is not built_in.loss:
        return
    first = next(tensors_in(outputs["out"] if isinstance(outputs, dict) and "out" in outputs else outputs), None)
    if first is None or first.dim() not in allowed:
        found = "no tensor" if first is None else f"{tuple(first.shape)}"
        raise PlanError(f"task '{task.name}' expects {expected}, and the network returns {found}: choose another task, "
                        "or pass criterion=(outputs, targets) -> loss")


class CriterionTask(Task):
    """A task from a criterion ``(outputs, targets) -> Tensor or dict``; a module's parameters are trained too."""

    name = "criterion"

    def __init__(self, criterion: Criterion, name: str = "criterion") -> None:
        if isinstance(criterion, type):
            raise PlanError(f"criterion= must be an instance, not the class: {criterion.__name__}()")
        if not callable(criterion):
            raise PlanError(f"criterion= must be callable (outputs, targets) -> loss, not {type(criterion).__name__}")
        self.criterion = criterion
        self.name = name

    def loss(self, outputs: Any, targets: Any) -> Tensor | dict[str, Tensor]:
        return self.criterion(outputs, targets)

    def modules(self) -> dict[str, nn.Module]:
        return {"criterion": self.criterion} if isinstance(self.criterion, nn.Module) else {}


class Classification(Task):
    """Cross-entropy on (N, classes) logits and (N,) labels; auxiliary logits of the model's own count 0.3 and 0.4.

    Outputs that are tuples or dicts (GoogLeNet, Inception: Szegedy et al. 2015, sections 5 and 6) are summed as
    torchvision's reference training does.
    """

    name = "classification"

    def fits(self, outputs: Any) -> None:
        _dimensions(self, Classification, outputs, (2,), "logits (N, classes)")

    def example_targets(self, model: nn.Module, inputs: Any, outputs: Any) -> Any:
        return torch.zeros(next(tensors_in(outputs)).shape[0], dtype=torch.int64)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if isinstance(outputs, Tensor):
            return F.cross_entropy(outputs, targets)
        values = outputs.values() if isinstance(outputs, dict) else outputs
        found = [value for value in values if isinstance(value, Tensor)] if isinstance(values, Iterable) else []
        if not found:
            raise CriterionError(f"task 'classification' expects logits, or a tuple or dict of them, not "
                                 f"{type(outputs).__name__}: pass criterion=(outputs, targets) -> loss")
        main, *others = found
        weight = 0.4 if len(others) == 1 else 0.3
        return F.cross_entropy(main, targets) + sum(weight * F.cross_entropy(other, targets) for other in others)


class Segmentation(Task):
    """Cross-entropy on (N, classes, H, W) logits and (N, H, W) labels, 255 ignored; a dict's "aux" counts 0.5."""

    name = "segmentation"

    def fits(self, outputs: Any) -> None:
        if isinstance(outputs, dict) and "out" not in outputs and type(self).loss is Segmentation.loss:
            raise PlanError(
                "task 'segmentation' expects logits of pixels, or a dict with them as 'out', and the network returns a "
                f"dict with {', '.join(map(repr, outputs))}: pass criterion=(outputs, targets) -> loss")
        _dimensions(self, Segmentation, outputs, (3, 4, 5), "logits of pixels (N, classes, H, W)")

    def example_targets(self, model: nn.Module, inputs: Any, outputs: Any) -> Any:
        first = next(tensors_in(outputs))
        return first.new_zeros((first.shape[0], *first.shape[2:]), dtype=torch.int64)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if isinstance(outputs, Tensor):
            return _of_pixels(outputs, targets)
        loss = _of_pixels(outputs["out"], targets)
        if "aux" in outputs:
            loss = loss + 0.5 * _of_pixels(outputs["aux"], targets)
        return loss


def _of_pixels(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of labelled pixels; 0, and not a division by zero, where a batch has none."""
    total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
    return total / (labels != 255).sum().clamp(min=1)


class SuperResolution(Task):
    """L1 distance of (N, C, sH, sW) images (Lim et al. 2017, section 3.2)."""

    name = "super_resolution"

    def fits(self, outputs: Any) -> None:
        _dimensions(self, SuperResolution, outputs, (3, 4, 5), "images (N, C, H, W)")

    def averages_images(self, model: nn.Module, levels: Any) -> bool:
        return True

    def example_targets(self, model: nn.Module, inputs: Any, outputs: Any) -> Any:
        return torch.empty_like(next(tensors_in(outputs)), requires_grad=False)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.l1_loss(outputs, targets)


class AnyLoss(Task):
    """Stands for a loss that is not known, or whose targets are not: the mean square of the outputs."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        values = [value for value in tensors_in(outputs) if value.is_floating_point()]
        return torch.stack([value.float().square().mean() for value in values]).sum()

    def check(self, inputs: Any, targets: Any) -> None:
        """Anything goes."""


@dataclass(frozen=True)
class Spec:
    """Size and type of an example tensor: all that a plan keeps of example inputs."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def __repr__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")


def specs(inputs: Any) -> Any:
    if isinstance(inputs, list | tuple):  # lists and tuples alike, so that a plan equals its JSON
        return tuple(specs(value) for value in inputs)
    if isinstance(inputs, dict):
        return {key: specs(value) for key, value in inputs.items()}
    return tree_map_only(Tensor, Spec.of, inputs)
