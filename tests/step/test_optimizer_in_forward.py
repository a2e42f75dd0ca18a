"""An optimizer that steps each local module inside the forward pass: the ordinary loop's numbers, in less memory."""

import copy
import gc
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops_ddp import EXAMPLE, Net, batch, build, weights
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import glcan_fx
from glcan_fx import LocalModel, Options, PlanError, UnsupportedError
from glcan_fx.config import OPTIMIZERS
from glcan_fx.methods import GLCAN
from glcan_fx.models import retinanet
from glcan_fx.peak_memory import PeakMemory

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
ADAM = partial(torch.optim.Adam, lr=1e-2)


def detection_batch(seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, 2, 2, generator=generator) * 24
    boxes = torch.cat([corners, corners + 24], dim=2)
    return ([torch.rand(3, 64, 64, generator=generator) for _ in range(2)],
            [{"boxes": boxes[i], "labels": torch.tensor([i, 2])} for i in range(2)])


@cache
def compiled_detector() -> LocalModel:
    torch.manual_seed(0)
    model = retinanet(depth=18, num_classes=3, fpn_channels=32, extra_levels=False, anchor_sizes=((8,), (16,), (32,)),
                      min_size=64, max_size=64)
    return glcan_fx.transform(model, task="detection", k=4, example_inputs=torch.empty(2, 3, 64, 64),
                              method=GLCAN(head="light", width=0.25))


def detector() -> LocalModel:
    return copy.deepcopy(compiled_detector())


def losses_of(result: Any) -> Tensor:
    return sum(result.values()) if isinstance(result, dict) else result.loss


def train(local: LocalModel, optimizer: torch.optim.Optimizer, data: Callable[[int], Any], steps: Any = range(3),
          scheduler: Any = None) -> None:
    for seed in steps:
        optimizer.zero_grad()
        losses_of(local(*data(seed))).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(local: LocalModel, twin: LocalModel) -> None:
    """Every parameter and buffer, bit for bit; but the scale of local losses is not used here."""
    expected = twin.state_dict()
    for name, value in local.state_dict().items():
        assert torch.equal(value, expected[name]), name


def assert_same_training(make: Callable[[], LocalModel], optimizer: Any, data: Callable[[int], Any]) -> LocalModel:
    """Three steps beside the ordinary loop; returns the model that was stepped in the forward pass."""
    local, twin = make().train(), make().train()
    train(local, local.optimizer_in_forward(optimizer), data)
    train(twin, optimizer(twin.parameters()), data)
    assert_same(local, twin)
    return local


def waiting(local: LocalModel, data: Callable[[int], Any]) -> set[str]:
    """Names of the parameters that still have a gradient behind backward()."""
    optimizer = local.train().optimizer_in_forward(torch.optim.SGD, lr=0.1)
    optimizer.zero_grad()
    losses_of(local(*data(0))).backward()
    assert optimizer is not None
    return {name for name, p in local.named_parameters() if p.grad is not None}


def classes(seed: int) -> tuple[Tensor, Tensor]:
    return batch(seed=seed)


# ------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["SGD", "Adam"])
@pytest.mark.parametrize(("make", "data"), [
    (lambda: build(criterion=F.cross_entropy), classes), (detector, detection_batch)], ids=["classifier", "RetinaNet"])
def test_the_ordinary_loops_numbers(make, data, optimizer):
    local = assert_same_training(make, optimizer, data)
    last = tuple(block.name for block in local.plan.modules[-1].blocks) + ("fc.", "head.", "backbone.fpn.")
    left = waiting(local, data)
    assert left and all(name.startswith(last) for name in left)


@pytest.mark.parametrize("options", [{"recompute": True}, {"slices": 2}], ids=["recomputed", "sliced"])
def test_savings_go_together(options):
    def make() -> LocalModel:
        torch.manual_seed(0)
        model = Net(norm=lambda channels: nn.GroupNorm(2, channels))
        plan = glcan_fx.plan(model, k="natural", task="classification", example_inputs=EXAMPLE,
                             options=Options(slices=options.get("slices", 1)))
        if "recompute" in options:
            plan = plan.replace(modules=tuple(replace(module, recompute=module.each) for module in plan.modules))
        return glcan_fx.transform(model, plan=plan)

    local = assert_same_training(make, SGD, classes)
    assert all(name.startswith(("block3.", "fc.")) for name in waiting(local, classes))


def test_clipping_per_module():
    local, twin = build(), build()
    train(local, local.optimizer_in_forward(SGD, max_norm=0.05), classes, range(1))
    twin(*batch(seed=0)).loss.backward()
    modules = [(f"aux.{i}.", name) for i, name in enumerate(["stem.", "block1.", "block2."])] + [("block3.", "fc.")]
    for prefixes in modules:
        clipped = [p for name, p in twin.named_parameters() if name.startswith(prefixes)]
        assert torch.nn.utils.clip_grad_norm_(clipped, 0.05) > 0.05
    SGD(twin.parameters()).step()
    assert_same(local, twin)


def test_schedulers_groups_and_resuming():
    """A function that makes groups; a checkpoint in the middle, which an ordinary optimizer can go on from, too."""
    def decayed(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.AdamW([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
                                  {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr": 0.02}])

    def scheduled(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=8)

    twin = build()
    ordinary = decayed(twin.parameters())
    train(twin, ordinary, classes, range(4), scheduled(ordinary))

    local = build()
    optimizer = local.optimizer_in_forward(decayed)
    scheduler = scheduled(optimizer)
    train(local, optimizer, classes, range(2), scheduler)
    assert optimizer.defaults == ordinary.defaults and len(optimizer.param_groups) == 2
    saved = pickle.dumps((local.state_dict(), optimizer.state_dict(), scheduler.state_dict()))

    for resumed_in_forward in (True, False):
        again = build()
        other = again.optimizer_in_forward(decayed) if resumed_in_forward else decayed(again.parameters())
        going = scheduled(other)
        for part, state in zip((again, other, going), pickle.loads(saved), strict=True):
            part.load_state_dict(state)
        train(again, other, classes, range(2, 4), going)
        assert_same(again, twin)
        assert len(other.state) == len(ordinary.state)


# ------------------------------------------------------------------------------------------------ who waits


class Shared(nn.Module):
    """Layers that several local modules use: called twice, and a table read as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.body, self.table = nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.randn(1, 8, 1, 1))
        self.end, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.sin(self.table)
        x = torch.relu(self.twice(torch.relu(self.stem(x))) + place)
        x = torch.relu(self.twice(torch.relu(self.body(x))) + place)
        return self.fc(torch.relu(self.end(x)).mean((2, 3)))


class Temperature(nn.Module):
    """A criterion that is trained, too."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.log.exp(), targets)


def shared() -> LocalModel:
    torch.manual_seed(0)
    return glcan_fx.transform(Shared(), criterion=Temperature(), example_inputs=EXAMPLE, k=["stem", "body"]).train()


def test_what_several_modules_use_waits_for_the_step():
    local = assert_same_training(shared, SGD, classes)
    left = waiting(local, classes)
    assert {"twice.weight", "table", "aux.task.criterion.log"} <= left
    assert not {"stem.weight", "body.weight"} & left


class Chatty(nn.Module):
    """Cannot be captured: runs as Python, a block at a time; with a parameter that belongs to none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.end = (nn.Conv2d(a, 8, 3, padding=1) for a in (3, 8, 8))
        self.scale, self.fc = nn.Parameter(torch.ones(())), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x) * self.scale)
        if x.sum() > 1e9:
            return self.fc(x.mean((2, 3)))
        return self.fc(torch.relu(self.end(torch.relu(self.block(x)))).mean((2, 3)))


@pytest.mark.parametrize("k", [2, "natural"])  # of two, only the first local module trains with a local loss
def test_models_that_run_as_python(k):
    def make() -> LocalModel:
        torch.manual_seed(0)
        return glcan_fx.transform(Chatty(), task="classification", example_inputs=EXAMPLE, k=k)

    local = assert_same_training(make, SGD, classes)
    assert local.plan.report.rung == 5
    left = waiting(local, classes)
    assert {"scale", "fc.weight"} <= left and "stem.weight" not in left


class Trunk(nn.Module):
    """All but its trunk runs as Python; what comes before the trunk is trained by the first local loss, in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.trunk, self.fc = nn.Conv2d(3, 8, 3, padding=1), Net(), nn.Linear(5, 5)
        self.trunk.stem[0] = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = self.trunk(x if x.sum() > -1e9 else -x)
        return self.fc(x if x.sum() > -1e9 else -x)


def test_models_around_a_trunk():
    def make() -> LocalModel:
        torch.manual_seed(0)
        return glcan_fx.transform(Trunk(), k="natural", task="classification", example_inputs=EXAMPLE)

    local = assert_same_training(make, SGD, classes)
    assert local.plan.report.rung == 4
    left = waiting(local, classes)
    assert {"before.weight", "fc.weight", "trunk.block3.conv1.weight"} <= left
    assert not {"trunk.stem.0.weight", "trunk.block1.conv1.weight"} & left


def test_frozen_parameters_and_gradients_of_the_input():
    def make() -> LocalModel:
        local = build()
        local.block1.conv1.weight.requires_grad_(False)
        return local

    assert_same_training(make, ADAM, classes)
    local, twin = build(), build()
    (images, labels), (others, _) = batch(), batch()
    optimizer = local.optimizer_in_forward(SGD)
    local(images.requires_grad_(), labels).loss.backward()
    optimizer.step()
    twin(others.requires_grad_(), labels).loss.backward()
    assert torch.equal(images.grad, others.grad)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def started() -> tuple[LocalModel, torch.optim.Optimizer]:
    local = build()
    return local, local.optimizer_in_forward(SGD)


def test_scaled_losses(started):
    local, _ = started
    with pytest.raises(UnsupportedError, match="scaled before backward.*0.25, not 1"):
        (local(*batch()).loss / 4).backward()
    local = build()
    optimizer = local.optimizer_in_forward(SGD)
    with pytest.raises(UnsupportedError, match="GradScaler"):
        torch.amp.GradScaler("cpu").scale(local(*batch()).loss).backward()
    local = build()
    optimizer = local.optimizer_in_forward(SGD)
    before = weights(local)
    with torch.autocast("cpu", torch.float16), pytest.raises(UnsupportedError, match="float16.*bfloat16"):
        local(*batch())
    assert all(torch.equal(value, before[name]) for name, value in weights(local).items())
    with torch.autocast("cpu", torch.bfloat16):
        loss = local(*batch()).loss
    loss.backward()
    optimizer.step()


def test_accumulation(started):
    local, optimizer = started
    local(*batch()).loss.backward()
    with pytest.raises(UnsupportedError, match="two training forward passes"):
        local(*batch())
    optimizer.zero_grad()  # a skipped batch does not end the training
    local(*batch()).loss.backward()
    with torch.no_grad():
        local(*batch())  # only looks
    optimizer.step()
    with pytest.raises(UnsupportedError, match="without a training forward pass"):
        optimizer.step()
    local(*batch()).loss.backward()
    with pytest.raises(UnsupportedError, match=r"zero_grad\(\) in every step"):
        optimizer.step()


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_anywhere(to_none):
    def steps(local, optimizer, where):
        for seed in range(4):
            if where == "before":
                optimizer.zero_grad(set_to_none=to_none)
            loss = local(*batch(seed=seed)).loss
            if where == "between":
                optimizer.zero_grad(set_to_none=to_none)
            loss.backward()
            optimizer.step()
            if where == "behind":
                optimizer.zero_grad(set_to_none=to_none)

    for where in ("before", "between", "behind"):
        torch.manual_seed(0)
        local = build().train()
        twin = copy.deepcopy(local)
        steps(local, local.optimizer_in_forward(SGD), where)
        steps(twin, SGD(twin.parameters()), where)
        assert_same(local, twin)


def test_what_comes_late_is_seen_on_a_cpu(started):
    local, optimizer = started
    for _ in range(7):
        optimizer.zero_grad()
        local(*batch()).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    for loss in local(*batch()).losses:  # the same sum
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    local(*batch()).loss.backward()
    with torch.no_grad():
        next(p for name, p in local.named_parameters() if name.startswith("stem")).mul_(0.5)
    with pytest.raises(UnsupportedError, match="was changed between its step"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(UnsupportedError, match="scaled before backward"):
        (local(*batch()).loss / 2).backward()


def test_losses_that_are_left_out_or_come_twice(started):
    local, optimizer = started
    local(*batch()).losses[-1].backward()
    with pytest.raises(UnsupportedError, match="'stem' did not reach backward"):
        optimizer.step()
    local = build()
    optimizer = local.optimizer_in_forward(SGD)
    loss = local(*batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(UnsupportedError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("change", [
    lambda local: torch.nn.utils.clip_grad_norm_(local.parameters(), 1e9),
    lambda local: torch.nn.utils.clip_grad_value_(local.parameters(), 1e9),
    lambda local: setattr(local.fc.weight, "grad", local.fc.weight.grad * 2),
], ids=["norm", "value", "replaced"])
def test_gradients_that_are_changed(started, change):
    local, optimizer = started
    local(*batch()).loss.backward()
    change(local)
    with pytest.raises(UnsupportedError, match="was changed between backward.*max_norm=1.0"):
        optimizer.step()


def test_what_the_steps_could_not_know_of(started):
    local, optimizer = started
    result = local(*batch())
    (result.loss + local.stem[0].weight.square().sum()).backward()
    with pytest.raises(UnsupportedError, match=r"'stem.0.weight' got a further gradient.*weight_decay"):
        optimizer.step()
    local = build()
    optimizer = local.optimizer_in_forward(SGD)
    local(*batch()).loss.backward()
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(UnsupportedError, match="param_groups changed.*before the forward pass"):
        optimizer.step()
    local = build()
    optimizer = local.optimizer_in_forward(SGD)
    local.stem[0].weight.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(UnsupportedError, match=r"'stem.0.weight' has a gradient hook"):
        local(*batch())


def test_a_use_that_nobody_declared():
    for module, match in ((0, "'stem.weight' was stepped with the local module"), (1, "'twice.weight' was stepped")):
        local = shared()
        owners = [part.name for part in local.plan.modules]
        optimizer = local.optimizer_in_forward(SGD)
        parameter = (local.stem, local.twice)[module].weight
        optimizer._owned = lambda name=owners[module], parameter=parameter: {name: [parameter]}
        if module == 0:
            local.task.criterion.forward = lambda outputs, targets, p=parameter: (
                F.cross_entropy(outputs, targets) + p.sum())
        with pytest.raises(UnsupportedError, match=match):
            local(*batch())


def test_several_processes(started, monkeypatch):
    local, _ = started
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    for call in (lambda: local(*batch()), lambda: build().optimizer_in_forward(SGD)):
        with pytest.raises(UnsupportedError, match="more than one process"):
            call()


def test_optimizers_that_cannot():
    with pytest.raises(UnsupportedError, match="LBFGS"):
        build().optimizer_in_forward(torch.optim.LBFGS)


# ------------------------------------------------------------------------------------------------ around it


def test_after_an_exception_the_next_step_is_a_new_one():
    """The steps that were made before it stay."""
    calls = iter(range(100))

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == 1:
            raise RuntimeError("the user's")
        return F.cross_entropy(outputs, targets)

    local = build(criterion=criterion)
    optimizer = local.optimizer_in_forward(SGD)
    before = weights(local)
    with pytest.raises(RuntimeError, match="the user's"):
        local(*batch())
    changed = {name for name, value in weights(local).items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("stem.", "aux.0.")) for name in changed)
    train(local, optimizer, classes, range(1))
    assert not torch.equal(local.block1.conv1.weight, before["block1.conv1.weight"])


def test_copies_are_not_stepped(started):
    local, optimizer = started
    train(local, optimizer, classes, range(1))
    for other in (copy.deepcopy(local), pickle.loads(pickle.dumps(local)), AveragedModel(local).module):
        before = weights(other)
        other(*batch()).loss.backward()
        assert all(torch.equal(value, before[name]) for name, value in weights(other).items())
        assert all(p.grad is not None for p in other.parameters())
    with pytest.raises(UnsupportedError, match=r"state_dict\(\)"):
        copy.deepcopy(optimizer)


def test_it_steps_as_long_as_the_optimizer_exists():
    local = build()
    optimizer = local.optimizer_in_forward(SGD)
    del optimizer
    gc.collect()
    before = weights(local)
    local(*batch()).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in weights(local).items())


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "closure"])
def test_around_it(how):
    def loop(local: LocalModel, optimizer: torch.optim.Optimizer) -> None:
        step = torch.compile(local, backend="eager") if how == "compiled" else local
        for seed in range(2):
            images, labels = batch(seed=seed)

            def closure(images=images, labels=labels) -> Tensor:
                optimizer.zero_grad()
                loss = (checkpoint(lambda x, y: local(x, y).loss, images.requires_grad_(), labels, use_reentrant=True)
                        if how == "checkpointed" else step(images, labels).loss)
                loss.backward()
                return loss.detach()

            optimizer.step(closure)

    torch._dynamo.reset()
    local, twin = build(k=2), build(k=2)
    loop(local, local.optimizer_in_forward(SGD))
    loop(twin, SGD(twin.parameters()))
    assert_same(local, twin)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ memory


class Heavy(nn.Module):
    """Weights are most of the memory."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 128, 3, 2, 1), *(nn.Conv2d(128, 128, 3, 1, 1) for _ in range(6))]
        self.blocks = nn.Sequential(*(nn.Sequential(layer, nn.ReLU()) for layer in layers))
        self.fc = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_simulated_and_real_peaks(name):
    make: Any = partial(OPTIMIZERS[name], lr=1e-4)
    images, labels = batch()
    plan = glcan_fx.plan(Heavy(), k="natural", task="classification", example_inputs=images)
    peaks = {}
    for in_forward in (False, True):
        local = glcan_fx.transform(Heavy(), plan=plan).train()
        optimizer = local.optimizer_in_forward(make) if in_forward else make(local.parameters())
        train(local, optimizer, classes, range(2))
        optimizer.zero_grad()
        with PeakMemory(local, optimizer, images) as memory:
            loss = local(images, labels).loss
            loss.backward()
            optimizer.step()
        peaks[in_forward] = memory.bytes
        simulated = glcan_fx.estimate_memory(plan, in_forward=in_forward, options=Options(optimizer=name))
        assert simulated.peak == pytest.approx(memory.bytes, rel=0.02)
        assert sum(simulated.parts.values()) == simulated.peak
    assert peaks[True] < 0.85 * peaks[False]
    assert plan.estimate(name, in_forward=True).plan.peak < plan.estimate(name).plan.peak


def test_estimates_that_make_no_sense():
    plan = glcan_fx.plan(Net(), k="natural", task="classification", example_inputs=EXAMPLE)
    with pytest.raises(PlanError, match="in_forward=True"):
        glcan_fx.estimate_memory(plan, in_forward=True, options=Options(optimizer=None))
    with pytest.raises(PlanError, match="only local modules"):
        glcan_fx.estimate_memory(Net(), EXAMPLE, task="classification", in_forward=True)
