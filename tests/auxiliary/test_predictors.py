"""The model's own last layer as the predictor of auxiliary networks: read, and not trained by them."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision
from loops_ddp import EXAMPLE, Net, batch, gradients, plain_step
from torch import Tensor, nn

import glcan_fx
from glcan_fx import LocalModel, Plan, PlanError
from glcan_fx.layers import weights_in
from glcan_fx.methods import GLCAN
from glcan_fx.models import edsr, retinanet

BOXES = {"boxes": torch.tensor([[10.0, 12.0, 50.0, 40.0]]), "labels": torch.tensor([1])}


def classifier() -> tuple[nn.Module, dict[str, Any], tuple[Any, ...]]:
    return Net(), {"task": "classification", "k": "natural", "example_inputs": EXAMPLE, "width": 1.0}, batch()


def super_resolution() -> tuple[nn.Module, dict[str, Any], tuple[Any, ...]]:
    x = torch.rand(2, 3, 12, 12)
    model = edsr(2, blocks=3, channels=16)
    given = {"task": "super_resolution", "k": "natural", "example_inputs": x, "head": "lean"}
    return model, given, (x, torch.rand(2, 3, 24, 24))


def detector() -> tuple[nn.Module, dict[str, Any], tuple[Any, ...]]:
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    model = retinanet(depth=18, num_classes=3, fpn_channels=32, extra_levels=False, anchor_sizes=((8,), (16,), (32,)),
                      min_size=64, max_size=64)
    given = {"task": "detection", "k": 3, "example_inputs": images, "head": "light", "width": 0.25}
    return model, given, (images, [BOXES, BOXES])


def losses_of(result: Any) -> Tensor:
    return sum(result.values()) if isinstance(result, dict) else result.loss


def upsampler() -> tuple[nn.Module, dict[str, Any], tuple[Any, ...]]:
    model, given, inputs = super_resolution()
    return model, given | {"head": "light", "width": 1.0}, inputs


READ = {"classification": (classifier, "tail.fc", "fc"), "super-resolution": (upsampler, "tail.tail.2", "tail.2")}


@pytest.fixture(scope="module", params=READ)
def reading(request) -> tuple[nn.Module, Plan, tuple[Any, ...], str, str]:
    """A model, a plan that reads its predictor, a batch, where the predictor is in an auxiliary network, and in it."""
    torch.manual_seed(0)
    make, path, source = READ[request.param]
    model, given, inputs = make()
    return model, glcan_fx.plan(model, **given, predictors="model"), inputs, path, source


def step_by_hand(local: LocalModel, inputs: tuple[Any, ...], path: str, source: str) -> dict[str, Tensor]:
    """Gradients by plain autograd, with frozen copies of the predictor as it is."""
    twin = copy.deepcopy(local)
    for index in range(twin.plan.k - 1):
        layer = copy.deepcopy(twin.original.get_submodule(source)).requires_grad_(False)
        twin.aux.get_submodule(f"{index}.network").set_submodule(path, layer)
    losses_of(plain_step(twin, *inputs)).backward()
    return {name: gradient for name, gradient in gradients(twin).items() if f".network.{path}." not in name}


def test_the_models_predictor_is_read_and_not_trained(reading):
    """By local losses: its gradient is the last module's alone. What it reads are the weights after each step."""
    model, plan, inputs, path, source = reading
    local = glcan_fx.transform(copy.deepcopy(model), plan=plan).train()
    assert not [name for name, _ in local.aux.named_parameters() if f".network.{path}." in name]
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for _ in range(3):
        expected = step_by_hand(local, inputs, path, source)
        optimizer.zero_grad()
        losses_of(local(*inputs)).backward()
        found = gradients(local)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        before = local.original.get_submodule(source).weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, local.original.get_submodule(source).weight)


def test_what_is_read_costs_no_parameters(reading):
    model, plan, _, path, source = reading
    local = glcan_fx.transform(copy.deepcopy(model), plan=plan)
    assert sum(module.aux_parameters for module in plan.modules) == weights_in(local.aux)
    assert "the model's predictors" in str(plan)
    assert plan.memory.plan.peak > 0


def test_copies_read_their_own_model(reading):
    model, plan, inputs, path, source = reading
    local = glcan_fx.transform(copy.deepcopy(model), plan=plan).train()
    expected = step_by_hand(local, inputs, path, source)
    for one in (copy.deepcopy(local), pickle.loads(pickle.dumps(local)), copy.copy(local),
                glcan_fx.transform(copy.deepcopy(model), plan=Plan.from_json(plan.to_json())).train()):
        one.load_state_dict(local.state_dict())
        if one.original is not local.original:
            with torch.no_grad():
                local.original.get_submodule(source).weight.mul_(2)  # another's
        losses_of(one.train()(*inputs)).backward()
        for name, gradient in gradients(one).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
        one.zero_grad()
        if one.original is not local.original:
            with torch.no_grad():
                local.original.get_submodule(source).weight.div_(2)


def test_a_predictor_that_is_replaced_is_read():
    """Another number of classes: the auxiliary networks follow."""
    local = glcan_fx.transform(Net(), k="natural", task="classification", example_inputs=EXAMPLE,
                               method=GLCAN(width=1.0, predictors="model"))
    local.fc = nn.Linear(local.original.fc.in_features, 3)
    out = local.train()(EXAMPLE, torch.zeros(len(EXAMPLE), dtype=torch.int64))
    out.loss.backward()
    assert out.output.shape[1] == 3 and local.fc.weight.grad is not None


@pytest.mark.slow
def test_the_models_predictor_with_compile_and_in_the_forward_pass(reading):
    model, plan, inputs, path, source = reading
    local, twin = (glcan_fx.transform(copy.deepcopy(model), plan=plan).train() for _ in range(2))
    twin.load_state_dict(local.state_dict())
    inside = local.optimizer_in_forward(torch.optim.SGD, lr=1e-2)
    for one, optimizer in ((local, inside), (twin, torch.optim.SGD(twin.parameters(), lr=1e-2))):
        for _ in range(2):
            optimizer.zero_grad()
            losses_of(one(*inputs)).backward()
            optimizer.step()
    expected = twin.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in local.state_dict().items())
    twin.zero_grad()
    again = copy.deepcopy(twin)
    compiled = torch.compile(again, backend="aot_eager")
    for one in (compiled, twin):
        losses_of(one(*inputs)).backward()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(again)[name], gradient, rtol=1e-4, atol=1e-5)


def test_what_is_left_out_suits_the_models_predictor():
    """The planner would choose narrow networks here, in front of which the model's last layer does not fit."""
    given = {"task": "classification", "example_inputs": torch.empty(8, 3, 64, 64, device="meta"), "k": 3}
    model = torchvision.models.resnet50(num_classes=10)
    assert glcan_fx.plan(model, **given).method.width < 1
    plan = glcan_fx.plan(model, **given, predictors="model")
    assert plan.method.width == 1 and "the model's predictors" in str(plan)


def test_where_no_network_has_the_models_predictor():
    model, given, _ = detector()
    with pytest.raises(PlanError, match="predictors='model': no auxiliary network ends with a layer of the shape"):
        glcan_fx.plan(model, **given, predictors="model")
