"""Bad input: every error says what is wrong, where, and what to do; the user's model stays as it was."""

import io
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loops_ddp import EXAMPLE, Net, batch, build
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import glcan_fx
from glcan_fx import GlcanFxError, LocalModel, Plan, PlanError, TargetError, TraceError
from glcan_fx.capture.ladder import trace
from glcan_fx.methods import GLCAN
from glcan_fx.models import retinanet

EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that somebody could miss: bits, mode, hooks, attributes; random states too."""
    modules = dict(model.named_modules())
    return {
        "bits": {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
        "identity": {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()},
        "frozen": {name for name, parameter in model.named_parameters() if not parameter.requires_grad},
        "gradients": {name for name, parameter in model.named_parameters() if parameter.grad is not None},
        "modules": {name: (id(part), type(part)) for name, part in modules.items()},
        "mode": {name: part.training for name, part in modules.items()},
        "attributes": {name: sorted(vars(part)) for name, part in modules.items()},
        "hooks": {name: [list(value) for key, value in sorted(vars(part).items()) if key.endswith("_hooks")]
                  for name, part in modules.items()},
        "random": (torch.get_rng_state().tolist(), random.getstate()),
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """In an unusual state (modes, a hook, a frozen weight), the model must not change, nor its hooks run."""
    def hook(*_: Any) -> None:
        raise AssertionError("a hook of the user's ran")

    parts = list(model.modules())
    parts[-1].eval()
    if isinstance(model, Net):
        model.block1.conv1.weight.requires_grad_(False)
    parts[len(parts) // 2].register_forward_hook(hook)
    before = snapshot(model)
    yield
    after = snapshot(model)
    for key, value in before.items():
        assert after[key] == value, key


def transform(model: Any, **options: Any) -> LocalModel:
    return glcan_fx.transform(model, **{"task": "classification", "example_inputs": EXAMPLE, **options})


def refused(model: nn.Module, kind: type[Exception], match: str, **options: Any) -> str:
    """``transform`` and ``plan`` raise the same error, and leave the model alone; returns the message."""
    with untouched(model):
        with pytest.raises(kind, match=match) as caught:
            transform(model, **options)
        with pytest.raises(kind, match=match):
            glcan_fx.plan(model, **{"task": "classification", "example_inputs": EXAMPLE, **options})
    return str(caught.value)


def test_a_successful_transform_leaves_the_model_alone_too():
    model = Net()
    with untouched(model):
        transform(model)


# ------------------------------------------------------------ the model


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class BranchInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else x


class Alone(nn.Module):
    """Nothing that could be cut behind the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))


def test_untraceable_model():
    message = refused(Alone(), TraceError, "Alone cannot be captured")
    assert "test_errors.py" in message and "if x.sum() > 0" in message  # the line
    assert "what to do" in message and "sub-module" in message and "tried" in message


def test_branch_at_the_root():
    model = Branch()
    with untouched(model):
        report = glcan_fx.plan(model, k="natural", task="classification", example_inputs=EXAMPLE).report
    assert report.rung == 5 and "test_errors.py" in report.lost[0]


def test_untraceable_sub_module_is_named():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), BranchInside(), Net())
    with untouched(model):
        [opaque] = trace(model, [torch.empty(2, 3, 32, 32)]).report.opaque
    assert (opaque.path, opaque.kind) == ("1", "BranchInside")
    assert "test_errors.py" in opaque.where and "x.mean() > 0" in opaque.where


def test_forward_that_fails_names_its_module():
    model = Net()
    model.fc = nn.Linear(17, 5)
    message = refused(model, TraceError, "module 'fc' of class Linear")
    assert "example_inputs" in message


def test_no_trainable_parameters():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    refused(Frozen(), PlanError, "Frozen has no trainable parameters.*requires_grad_")
    refused(nn.Sequential(nn.ReLU()), PlanError, "no trainable parameters")


@pytest.mark.parametrize("wrap", [lambda local: local, nn.Sequential], ids=["itself", "inside another"])
def test_a_compiled_model(wrap):
    refused(wrap(build()), PlanError, "compiled already.*original")


def test_torch_compile_comes_after_transform():
    with pytest.raises(GlcanFxError, match=r"torch\.compile"):
        transform(torch.compile(Net(), backend="eager"))


def test_data_parallel():
    refused(nn.DataParallel(Net()), PlanError, r"DataParallel.*model\.module")


def test_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        message = refused(DistributedDataParallel(Net()), PlanError, r"bare model.*model\.module")
        assert "DistributedDataParallel(glcan_fx.transform(model" in message
    finally:
        dist.destroy_process_group()


def test_something_that_is_no_module():
    with pytest.raises(PlanError, match="Module, not function"):
        transform(F.relu)


@pytest.mark.parametrize("name", ["plan", "task", "original", "aux"])
def test_members_with_names_that_the_compiled_module_needs(name):
    class Taken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule(name)(super().forward(x))

    model = Taken()
    model.add_module(name, nn.Linear(5, 5))
    with untouched(model), pytest.raises(PlanError, match=f"'{name}'.*another name"):
        transform(model)


def test_a_forward_with_an_argument_called_targets():
    class Own(Net):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            return super().forward(x)

    model = Own()
    with untouched(model), pytest.raises(GlcanFxError, match="targets"):
        transform(model)


# ------------------------------------------------------------ how many local modules, and where

OFFERS = "stem, block1, block2"


@pytest.mark.parametrize("k", [0, -1, 5, True])
def test_k_out_of_range(k):
    message = refused(Net(), PlanError, f"k={k} .*not possible.*1 to 4", k=k)
    assert OFFERS in message


@pytest.mark.parametrize("k", [2.0, "many", "block1", None, {"block1": 1}])
def test_k_of_a_wrong_kind(k):
    refused(Net(), PlanError, "k must be a number, 'fewest', 'natural' or a list of split points", k=k)


@pytest.mark.parametrize(("name", "reason"), [
    ("block9", "is not a module"),
    ("block1.shortcut", "inside a block, or beside the trunk"),
    ("fc", "inside a block, or beside the trunk"),
    (3, "is not a module"),
    ("block3", "ends the trunk"),
])
def test_split_points_that_do_not_exist(name, reason):
    message = refused(Net(), PlanError, f"split point '{name}' .*{reason}", k=["block1", name])
    assert OFFERS in message


# ------------------------------------------------------------ task, criterion, options


@pytest.mark.parametrize("task", ["classify", 3, nn.CrossEntropyLoss])
def test_unknown_task(task):
    message = refused(Net(), PlanError, "classification, detection, own_loss, segmentation", task=task)
    assert "criterion=" in message


def test_neither_task_nor_criterion():
    refused(Net(), PlanError, r"task= or criterion= is required.*classification", task=None)


def test_task_object_and_criterion():
    refused(Net(), PlanError, "not both", task=glcan_fx.Classification(), criterion=F.cross_entropy)


@pytest.mark.parametrize("task", ["segmentation", "super_resolution"])
def test_task_that_does_not_fit_the_outputs(task):
    refused(Net(), PlanError, rf"task '{task}' expects .*returns \(2, \d+\): choose another", task=task)


def test_a_subclass_with_a_loss_of_its_own_decides_itself():
    class Places(glcan_fx.Classification):
        def loss(self, outputs, targets):
            return F.cross_entropy(outputs, targets)

        def example_targets(self, model, inputs, outputs):
            return torch.zeros(2, 4, 4, dtype=torch.int64)

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    plan = glcan_fx.plan(model, k="natural", task=Places(), example_inputs=torch.empty(2, 3, 4, 4))
    with pytest.raises(PlanError, match="expects logits"):
        glcan_fx.transform(model, task="classification", plan=plan)


def test_classification_of_places():
    refused(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)), PlanError,
            r"logits \(N, classes\), and the network returns \(2, 5, \d+, \d+\)", task="classification")


def test_targets_that_do_not_fit():
    """The loss's own error, with the sizes of what it got."""
    local = glcan_fx.transform(Net(), k="natural", task="classification", example_inputs=EXAMPLE)
    with pytest.raises(ValueError, match="batch") as caught:
        local(EXAMPLE, torch.zeros(3, dtype=torch.int64))
    note, = caught.value.__notes__
    assert "task 'classification'" in note and "targets [3] int64" in note and "outputs [2, " in note


def test_criterion_that_cannot_be_called():
    refused(Net(), PlanError, "criterion= must be callable.*not int", task=None, criterion=3)


def test_no_example_inputs():
    refused(Net(), PlanError, r"needs example_inputs=.*torch\.empty", example_inputs=None)


@pytest.mark.parametrize("example", [
    "images", torch.empty(2, 4, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.int64), torch.empty(2, 3),
    (EXAMPLE, EXAMPLE), (),
], ids=["text", "channels", "integers", "axes", "one too many", "none"])
def test_example_inputs_that_do_not_fit(example):
    message = refused(Net(), GlcanFxError, "Net", example_inputs=example)
    assert "example_inputs" in message


def test_example_inputs_of_another_type_than_the_model():
    message = refused(Net(), GlcanFxError, "double|float64", example_inputs=EXAMPLE.double())
    assert "example_inputs" in message


@pytest.mark.parametrize(("options", "match"), [
    ({"width": 0}, "width=0.*above 0 and at most 1"),
    ({"width": 1.5}, "width=1.5"),
    ({"width": float("nan")}, "width=nan"),
    ({"width": "half"}, "width='half'"),
    ({"depth": -1}, "depth=-1.*0 or more"),
    ({"depth": 0.5}, "depth=0.5"),
    ({"depth": True}, "depth=True"),
    ({"head": "heavy"}, "head='heavy'.*'full', 'light' or 'lean'"),
    ({"stride": 0}, "stride=0.*1 or more"),
    ({"rules": "all"}, "rules.*Rules"),
])
def test_bad_options(options, match):
    refused(Net(), PlanError, match, **options)


@pytest.mark.parametrize("call", [glcan_fx.transform, glcan_fx.plan])
def test_unknown_keywords(call):
    """As any Python function does."""
    model = Net()
    with untouched(model), pytest.raises(TypeError, match="auxdepth"):
        call(model, task="classification", example_inputs=EXAMPLE, auxdepth=1)


# ------------------------------------------------------------ plans


def made(model: nn.Module | None = None) -> Plan:
    return glcan_fx.plan(model or Net(), k="natural", task="classification", example_inputs=EXAMPLE)


@pytest.mark.parametrize("text", [
    "", "garbage", "{}", "[]", "null", "3", '"plan"', '{"format": "glcan_fx.plan"}', None, b"\xff\xfe",
    '{"format": "another", "version": 1}',
])
def test_text_that_is_no_plan(text):
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(text)


def test_plan_of_another_version():
    text = json.dumps(json.loads(made().to_json()) | {"version": 99})
    with pytest.raises(PlanError, match=r"version 7.*glcan_fx\.plan\(\)"):
        Plan.from_json(text)


@pytest.mark.parametrize("field", ["modules", "method", "inputs", "natural", "task"])
@pytest.mark.parametrize("value", [None, 3, [3], {"a": 1}, [{}]], ids=str)
def test_damaged_plan(field, value):
    """It is refused when read, or at the latest when applied."""
    text = json.dumps(json.loads(made().to_json()) | {field: value})
    model = Net()
    with untouched(model):
        try:
            plan = Plan.from_json(text)
        except PlanError:
            return
        if field == "natural":  # only shown
            return
        with pytest.raises(GlcanFxError):
            glcan_fx.transform(model, plan=plan)


def test_plan_for_another_model():
    plan = made()
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    with untouched(other):
        with pytest.raises(PlanError, match="cuts at 'stem'.*Sequential.*another model.*Make a new plan"):
            glcan_fx.transform(other, plan=plan)
        with pytest.raises(PlanError, match="another model"):
            glcan_fx.transform(other, plan=plan)


def test_plan_for_a_model_that_needs_a_criterion():
    plan = glcan_fx.plan(Net(), k="natural", criterion=F.cross_entropy, example_inputs=EXAMPLE)
    model = Net()
    with untouched(model), pytest.raises(PlanError, match="criterion="):
        glcan_fx.transform(model, plan=Plan.from_json(plan.to_json()))


def test_plan_and_other_options():
    model, plan = Net(), made()
    with untouched(model), pytest.raises(PlanError, match="already decides k, method"):
        glcan_fx.transform(model, plan=plan, k=2, method=GLCAN(head="full"))


def test_plan_that_is_none():
    model, text = Net(), made().to_json()
    with untouched(model), pytest.raises(GlcanFxError, match="Plan"):
        glcan_fx.transform(model, plan=text)


def test_plan_with_the_task_by_name():
    local = glcan_fx.transform(Net(), plan=Plan.from_json(made().to_json()), task="classification")
    assert local.task.name == "classification"


def test_plan_with_another_criterion_uses_it():
    local = glcan_fx.transform(Net(), plan=made(), criterion=lambda outputs, targets: outputs.sum() * 0 + 7)
    assert local(*batch()).losses == (7, 7, 7, 7)


# ------------------------------------------------------------ a training step


@pytest.fixture(scope="module")
def local() -> LocalModel:
    return build()


def bad_step(local: LocalModel, kind: type[Exception], match: str, *inputs: Any) -> None:
    """The error comes before anything has moved, and the next good step works."""
    before = snapshot(local)
    with pytest.raises(kind, match=match):
        local(*inputs)
    after = snapshot(local)
    assert all(after[key] == before[key] for key in before)


def test_no_targets(local):
    bad_step(local, TargetError, r"needs targets.*local\(inputs, targets\).*local\.eval\(\)", batch()[0])


def test_images_of_another_type(local):
    """torch's own words."""
    bad_step(local, RuntimeError, "expected.*Double.*Float", batch()[0].double(), batch()[1])


def test_images_on_another_device(local):
    with pytest.raises(RuntimeError, match="device"):
        local(batch()[0].to("meta"), batch()[1])


def test_too_many_inputs(local):
    bad_step(local, glcan_fx.TargetError, "takes x, targets, not 3 arguments", *batch(), batch()[1])


def test_labels_out_of_range(local):
    with pytest.raises(IndexError, match="Target 13 is out of bounds"):
        local(batch()[0], torch.full((8,), 13))


@pytest.mark.parametrize(("criterion", "match"), [
    (lambda outputs, targets: 1.0, "criterion.*float"),
    (lambda outputs, targets: None, "criterion.*NoneType"),
    (lambda outputs, targets: {}, "criterion.*dict"),
    (lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"), "criterion.*scalar.*8"),
    (lambda outputs, targets: {"a": outputs.sum(), "b": outputs.sum(1)}, "criterion.*scalar.*8"),
], ids=["number", "none", "empty", "vector", "dict of vectors"])
def test_criterion_that_returns_no_scalar(criterion, match):
    local = build(criterion=criterion)
    with pytest.raises(GlcanFxError, match=match):
        local(*batch())


def test_criterion_that_fails_is_not_hidden():
    def criterion(outputs, targets):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        build(criterion=criterion)(*batch())


def test_detached_losses():
    with pytest.raises(glcan_fx.CriterionError, match="'stem'.*depends on none of its parameters"):
        build(criterion=lambda outputs, targets: outputs.detach().sum())(*batch())


def test_nan_loss_passes_through():
    """The loop decides what to do with it, as in torchvision's reference."""
    local = build()
    images, labels = batch()
    result = local(images * float("nan"), labels)
    assert result.loss.isnan() and all(loss.isnan() for loss in result.losses)
    result.loss.backward()
    assert local.stem[0].weight.grad.isnan().all() and local.fc.weight.grad.isnan().all()


# ------------------------------------------------------------ detection


def small_detector(**options: Any) -> nn.Module:
    return retinanet(depth=18, num_classes=3, fpn_channels=32, extra_levels=False,
                     anchor_sizes=((8,), (16,), (32,)), min_size=64, max_size=64, **options)


@pytest.fixture(scope="module")
def detector() -> LocalModel:
    torch.manual_seed(0)
    return glcan_fx.transform(small_detector(), task="detection", k=["backbone.body.layer2"],
                              example_inputs=torch.empty(2, 3, 64, 64))


def images(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 64, 64, generator=generator) for _ in range(count)]


def target() -> dict[str, Tensor]:
    return {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}


@pytest.mark.parametrize("example", [torch.empty(2, 3, 64, 64), None], ids=["images", "default"])
def test_detection_without_transform_and_backbone(example):
    message = refused(Net(), PlanError, "no module 'transform'", task="detection", example_inputs=example)
    assert "criterion=" in message


@pytest.mark.parametrize("example", ["images", [], torch.empty(3, 64, 64), [torch.empty(64, 64)], 3],
                         ids=["text", "empty", "one image", "no channels", "number"])
def test_detection_example_inputs_that_are_no_images(example):
    with pytest.raises(PlanError, match=r"example_inputs= for detection.*\(3, H, W\) images"):
        glcan_fx.plan(small_detector(), k="natural", task="detection", example_inputs=example)


def test_detection_without_targets(detector):
    bad_step(detector, TargetError, r"needs targets.*local\(images, targets\).*boxes and labels", images())


@pytest.mark.parametrize(("targets", "match"), [
    ([target(), {"box": target()["boxes"], "labels": target()["labels"]}], "(?s)1.*'boxes'.*box"),
    ([{"boxes": target()["boxes"]}, target()], "(?s)0.*'labels'"),
    ([target()], "1 .*2|2 .*1"),
    ([target()] * 3, "3 .*2|2 .*3"),
    (target(), "list"),
    (torch.zeros(2, 5), "list"),
    ([target(), None], "dict"),
    ([target(), torch.zeros(1, 5)], "dict"),
    ([{"boxes": torch.tensor([8.0, 8.0, 40.0, 40.0]), "labels": torch.tensor([1])}] * 2, "boxes.*4"),
    ([{"boxes": [[8.0, 8.0, 40.0, 40.0]], "labels": torch.tensor([1])}] * 2, "boxes.*list"),
    ([{"boxes": target()["boxes"], "labels": torch.tensor([1, 2])}] * 2, "1 boxes.*2 labels|labels"),
], ids=["box for boxes", "no labels", "too few", "too many", "a dict", "a tensor", "none inside",
        "tensor inside", "flat boxes", "boxes as lists", "labels and boxes differ"])
def test_detection_targets_of_a_wrong_form(detector, targets, match):
    bad_step(detector, TargetError, match, images(), targets)


def test_degenerate_boxes(detector):
    """torchvision's own words."""
    boxes = torch.tensor([[10.0, 10.0, 5.0, 5.0]])
    with pytest.raises((AssertionError, TargetError), match="positive height and width.*index 1"):
        detector(images(), [target(), {"boxes": boxes, "labels": torch.tensor([1])}])


@pytest.mark.parametrize("targets", [[EMPTY, EMPTY], [target(), EMPTY]], ids=["all", "one"])
def test_images_without_objects_train(detector, targets):
    detector.zero_grad()
    losses = detector(images(), targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name in ("backbone.body.conv1", "backbone.body.layer4.1.conv2", "head.classification_head.cls_logits",
                 "aux.0.head.detector.head.classification_head.cls_logits"):
        gradient = detector.get_submodule(name).weight.grad
        assert gradient.isfinite().all() and gradient.any()


def test_nan_images_in_detection(detector):
    detector.zero_grad()
    state = io.BytesIO()
    torch.save(detector.state_dict(), state)  # a NaN reaches the batch statistics, as it would in any loop
    losses = detector([image * float("nan") for image in images()], [target(), target()])
    assert any(loss.isnan() for loss in losses.values())
    sum(losses.values()).backward()
    state.seek(0)
    detector.load_state_dict(torch.load(state))
