"""What a criterion may return, and that it must be a function of outputs and targets."""

import copy
import dataclasses
import pickle
import warnings
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx
from glcan_fx import CriterionError, Options, StatefulCriterionWarning
from glcan_fx.tasks.criteria import NamedLoss


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())
                  for a, b, stride in ((3, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2))]
        self.a, self.b, self.c, self.d = layers
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.d(self.c(self.b(self.a(x)))).mean((2, 3)))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.randint(5, (4,), generator=generator)


@cache
def planned(k: int, **options: Any) -> glcan_fx.Plan:
    return glcan_fx.plan(Net(), k=k, criterion=plain, example_inputs=torch.empty(4, 3, 16, 16), **options)


def compiled(criterion: Any, k: int = 3, **options: Any) -> glcan_fx.LocalModel:
    plan = planned(k, **options)
    torch.manual_seed(0)
    return glcan_fx.transform(Net(), criterion=criterion, plan=plan).train()


def ce(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def l2(outputs: Tensor) -> Tensor:
    return 0.1 * outputs.square().mean()


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def plain(outputs: Tensor, targets: Tensor) -> Tensor:
    return ce(outputs, targets) + l2(outputs)


def gradients(local: glcan_fx.LocalModel) -> list[Tensor]:
    local.zero_grad()
    local(*batch()).loss.backward()
    return [p.grad.clone() for p in local.parameters() if p.grad is not None]


def refused(criterion: Any, match: str, *targets: Any, k: int = 3, kind: type[Exception] = CriterionError) -> str:
    local = compiled(criterion, k)
    with pytest.raises(kind, match=match) as caught:
        local(batch()[0], *(targets or batch()[1:]))
    return str(caught.value)


# ------------------------------------------------------------ named values: what is minimised


def summed(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    return {"ce": ce(outputs, targets), "l2": l2(outputs)}


def with_metrics(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    return {**summed(outputs, targets), "accuracy": accuracy(outputs, targets), "images": len(targets), "note": "text",
            "each": F.cross_entropy(outputs, targets, reduction="none").detach(), "none": None}


def with_total(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    parts = summed(outputs, targets)
    return {"loss": sum(parts.values()), **parts, "accuracy": accuracy(outputs, targets)}


def with_total_of_copies(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """Not computed from the parts, but equal to their sum."""
    return {**summed(outputs, targets), "total_loss": plain(outputs, targets)}


def with_total_of_unweighted(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    first, second = ce(outputs, targets), outputs.square().mean()
    return {"total": first + 0.1 * second, "ce": first, "l2": second, "perplexity": first.exp()}


def with_detached(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    return {"loss": plain(outputs, targets), "ce": ce(outputs, targets).detach(), "l2": l2(outputs).item()}


def with_count(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """A "total" that is the number of images."""
    return {**summed(outputs, targets), "total": torch.tensor(len(targets)), "correct": torch.tensor(1)}


def nested(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    return {"main": {"ce": ce(outputs, targets)}, "more": [l2(outputs)]}


@dataclasses.dataclass
class Losses:
    ce: Tensor
    l2: Tensor


class Pair(NamedTuple):
    ce: Tensor
    l2: Tensor


NAMED = {
    summed: {"ce", "l2"}, with_metrics: {"ce", "l2", "accuracy", "images", "each"},
    with_total: {"loss", "ce", "l2", "accuracy"}, with_total_of_copies: {"ce", "l2", "total_loss"},
    with_total_of_unweighted: {"total", "ce", "l2", "perplexity"}, with_detached: {"loss", "ce", "l2"},
    with_count: {"ce", "l2", "total", "correct"}, nested: {"main.ce", "more.0"},
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("criterion", NAMED, ids=lambda criterion: criterion.__name__)
def test_of_named_values_the_total_or_what_has_gradients_is_minimised(criterion, k):
    local, other = compiled(criterion, k), compiled(plain, k)
    out, expected = local(*batch()), other(*batch())
    torch.testing.assert_close(out.loss, expected.loss)
    for loss, alone in zip(out.losses, expected.losses, strict=True):
        torch.testing.assert_close(loss.as_subclass(Tensor), alone)
        assert set(loss) == NAMED[criterion]
    for one, two in zip(gradients(local), gradients(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("evaluate", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("criterion", [with_metrics, with_total, with_count])
def test_evaluation_minimises_the_same(criterion, trained, evaluate):
    local = compiled(criterion)
    if trained:
        local(*batch())
    local.eval()
    images, labels = batch()
    with evaluate():
        out = local(images, labels)
        torch.testing.assert_close(out.loss, plain(local.original(images), labels))
    assert set(out.losses[0]) == NAMED[criterion]


def test_evaluation_calls_the_criterion_once():
    calls = []

    def criterion(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        calls.append(0)
        return with_metrics(outputs, targets)

    local = compiled(criterion)
    local(*batch())
    calls.clear()
    with torch.no_grad():
        local.eval()(*batch())
    assert len(calls) == 1


def test_what_is_only_reported_is_not_differentiated():
    """Slices differentiate whatever has a gradient."""
    local = compiled(with_total)
    loss = local.task.head(None, None, None, (), "", 1.0, (1, 1))(torch.randn(4, 5, requires_grad=True), batch()[1])
    assert [name for name, value in loss.items() if value.requires_grad] == ["loss"]


def test_a_frozen_module_reports_the_same_loss():
    local, other = compiled(with_metrics), compiled(plain)
    for each in (local, other):
        each.a.requires_grad_(False)
        each.aux.get_submodule("0").requires_grad_(False)
    torch.testing.assert_close(local(*batch()).losses[0].as_subclass(Tensor), other(*batch()).losses[0])


def test_dataclasses_and_named_tuples_are_named_values():
    for kind in (Losses, Pair):
        out = compiled(lambda out, y, kind=kind: kind(ce(out, y), l2(out)))(*batch())
        assert set(out.losses[0]) == {"ce", "l2"}
        torch.testing.assert_close(out.loss, compiled(plain)(*batch()).loss)


def test_slices_know_metrics():
    local = compiled(with_total, k=2, options=Options(slices=2))
    out = local(*batch())
    assert set(out.losses[-1]) == NAMED[with_total]
    torch.testing.assert_close(out.loss, compiled(plain, k=2)(*batch()).loss)


def test_a_total_that_leaves_out_a_part_is_refused():
    message = refused(
        lambda out, y: {"loss": ce(out, y), "aux": l2(out), "accuracy": accuracy(out, y)}, "'loss'.*'aux'")
    assert "detach" in message and "another name" in message and "accuracy" not in message


def test_a_detached_total_is_refused():
    refused(lambda out, y: {"loss": plain(out, y).detach(), **summed(out, y)}, "'loss'.*no gradient.*'ce', 'l2'")
    refused(lambda out, y: {"loss": plain(out, y).item(), **summed(out, y)}, "'loss'.*no gradient.*'ce', 'l2'")


def test_a_total_is_looked_at_in_the_first_steps_only(monkeypatch):
    calls, local = [], compiled(with_total)
    monkeypatch.setattr(glcan_fx.tasks.criteria, "check_total", calls.append)
    for _ in range(5):
        local(*batch())
    assert len(calls) == 3 * 3  # modules, steps


# ------------------------------------------------------------ what a step returns


def test_a_named_loss_is_a_tensor():
    out = compiled(with_metrics)(*batch())
    last = out.losses[-1]
    assert isinstance(last, NamedLoss) and isinstance(last, Tensor) and last.dim() == 0
    assert last["accuracy"] in (0, 0.25, 0.5, 0.75, 1) and last["each"].shape == (4,)
    assert "ce" in last and "loss" not in last and dict(last).keys() == set(last)
    assert not any(part.requires_grad for part in dict(last).values())
    assert f"{last:.3f}" == f"{last.item():.3f}" and "accuracy" in repr(last)
    assert type(out.loss) is Tensor and type(last * 2) is Tensor and type(sum(out.losses)) is Tensor
    torch.testing.assert_close(torch.stack(out.losses).sum(), out.loss)
    torch.testing.assert_close(sum(out.losses), out.loss)
    assert torch.equal(copy.deepcopy(last.detach()), last.detach())
    assert pickle.loads(pickle.dumps(last.detach().as_subclass(Tensor))) == last.item()


def test_each_named_loss_can_be_minimised_alone():
    local = compiled(summed)
    local(*batch()).losses[0].backward()
    assert local.a[0].weight.grad is not None and local.d[0].weight.grad is None


@pytest.mark.parametrize("k", [1, 3])
def test_a_plain_loss_is_a_plain_tensor(k):
    out = compiled(plain, k)(*batch())
    assert all(type(loss) is Tensor for loss in (out.loss, *out.losses))


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("criterion", "match"), [
    (lambda out, y: None, "not NoneType: a 'return' is missing"),
    (lambda out, y: ce(out, y).item(), "not float, through which no gradient.*item"),
    (lambda out, y: ce(out, y).detach().numpy(), "not ndarray, through which no gradient.*numpy"),
    (lambda out, y: ce(out, y).detach().numpy()[()], "not float32, through which no gradient"),
    (lambda out, y: (ce(out, y), accuracy(out, y)), "not tuple: which of its values count.*dict: {'loss'"),
    (lambda out, y: [ce(out, y), l2(out)], "not list: which of its values count"),
    (lambda out, y: "loss", "not str"),
    (lambda out, y: {}, "dict holds no tensor"),
    (lambda out, y: {"ce": 1.0}, r"dict holds no tensor \(its entries: ce\)"),
    (lambda out, y: F.cross_entropy(out, y, reduction="none"), "a scalar, not a tensor of 4 values: reduce it"),
    (lambda out, y: {"ce": ce(out, y), "l2": out.square().mean(1)}, "'l2' of.* a scalar, not a tensor of 4.*detach"),
    (lambda out, y: ce(out, y).detach(), "depends on none of its parameters"),
    (lambda out, y: {"ce": ce(out, y).detach(), "l2": l2(out).detach()}, "depends on none of its parameters"),
    (lambda out, y: torch.zeros((), device="meta", requires_grad=True) * 1, "on meta for outputs on cpu"),
])
def test_what_is_no_loss_is_refused(criterion, match):
    refused(criterion, match)


# ------------------------------------------------------------ targets


@dataclasses.dataclass
class Labels:
    classes: Tensor
    weight: float = 1.0


def subtracts(outputs: Tensor, targets: Tensor) -> Tensor:
    targets -= 1
    return F.cross_entropy(outputs, targets)


def test_targets_that_are_changed_are_refused():
    labels = torch.full((4,), 4)
    message = refused(subtracts, "changes its targets: targets is not what it was", labels)
    assert "copy" in message and "y = y - 1" in message


def test_one_local_loss_may_change_its_targets():
    labels = torch.full((4,), 4)
    compiled(subtracts, k=1)(batch()[0], labels)
    assert (labels == 3).all()


def test_evaluation_may_change_its_targets():
    labels = torch.full((4,), 4)
    compiled(subtracts).eval()(batch()[0], labels)
    assert (labels == 3).all()


def changes_list(outputs: Tensor, targets: Any) -> Tensor:
    targets[1]["labels"].clamp_(max=2)
    return F.cross_entropy(outputs, torch.cat([target["labels"] for target in targets]))


def replaces(outputs: Tensor, targets: Any) -> Tensor:
    targets[0]["labels"] = targets[0]["labels"] % 5
    return F.cross_entropy(outputs, torch.cat([target["labels"] for target in targets]))


def adds(outputs: Tensor, targets: Any) -> Tensor:
    targets[0]["new"] = 1
    return F.cross_entropy(outputs, torch.cat([target["labels"] for target in targets]))


def removes(outputs: Tensor, targets: Any) -> Tensor:
    targets[1].pop("size")
    return F.cross_entropy(outputs, torch.cat([target["labels"] for target in targets]))


@pytest.mark.parametrize(("criterion", "where"), [
    (changes_list, r"targets\[1\]\['labels'\]"), (replaces, r"targets\[0\]\['labels'\]"),
    (adds, r"targets\[0\]\['new'\]"), (removes, r"targets\[1\]\['size'\]")])
def test_nested_targets_that_are_changed_are_named(criterion, where):
    labels = batch()[1]
    refused(criterion, where, [{"labels": labels[:2], "size": 1}, {"labels": labels[2:].clone(), "size": 2}])


def test_fields_of_targets_that_are_changed_are_named():
    def criterion(outputs: Tensor, targets: Labels) -> Tensor:
        targets.weight *= 2.5
        return F.cross_entropy(outputs, targets.classes) * targets.weight

    refused(criterion, r"targets\.weight", Labels(batch()[1]))


def test_a_detector_that_changes_its_targets_is_refused():
    from torchvision.models.detection import fcos_resnet50_fpn

    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
    inner = model.compute_loss

    def changed(targets: Any, *rest: Any) -> Any:
        for target in targets:
            target["labels"].add_(0)
        return inner(targets, *rest)

    local = glcan_fx.transform(model, k=2, task="detection", example_inputs=torch.empty(2, 3, 64, 64)).train()
    boxes = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    local(list(torch.rand(2, 3, 64, 64)), [boxes, boxes])
    local.aux.get_submodule("0.head.detector").__dict__["compute_loss"] = changed
    with pytest.raises(CriterionError, match=r"detector's loss changes its targets: targets\[0\]\['labels'\]"):
        local(list(torch.rand(2, 3, 64, 64)), [boxes, boxes])


# ------------------------------------------------------------ state


class Queue(nn.Module):
    def __init__(self, moves: bool = True) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(5))
        self.moves = moves

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.moves:
            self.queue.mul_(0.9).add_(outputs.detach().mean(0))
        return F.cross_entropy(outputs - 0 * self.queue, targets)


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets)

    def method(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self(outputs, targets)


@pytest.mark.parametrize(("criterion", "match"), [
    (Queue(), "buffer 'queue'.*each local loss"), (Counter(), "attribute 'calls'"), (Counter().method, "'calls'"),
    (nn.Sequential(), None)])
def test_a_criterion_with_state_is_warned_of_once(criterion, match):
    if match is None:
        criterion = Queue(moves=False)
    local = compiled(criterion)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            local(*batch())
    found = [str(w.message) for w in caught if w.category is StatefulCriterionWarning]
    assert len(found) == (match is not None)
    if match:
        with pytest.warns(StatefulCriterionWarning, match=match):
            compiled(criterion)(*batch())


def test_one_local_loss_may_have_state():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Queue(), k=1)(*batch())
        local = compiled(Queue(moves=False))
        local.task.criterion.moves = True
        local.eval()(*batch())
