"""Replacement Learning: weights that are made of the neighbours'."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from test_contract import Block
from torch import Tensor, nn

import glcan_fx
from glcan_fx import PlanError
from glcan_fx.methods import replace


def chain(blocks: int = 7) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(8, 8) for _ in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_weights_and_gradients_are_those_of_the_formula() -> None:
    model = chain(3)
    made = replace(model)
    x = torch.randn(2, 8, 6, 6)
    plain = copy.deepcopy(model)
    plain[1].conv.weight = nn.Parameter((plain[0].conv.weight + plain[2].conv.weight).detach() * 2**-0.5)
    torch.testing.assert_close(made(x), plain(x))
    made(x).square().sum().backward()
    plain(x).square().sum().backward()
    mixed = plain[1].conv.weight.grad
    sides = [plain[index].conv.weight for index in (0, 2)]
    torch.testing.assert_close(made[0].conv.weight.grad, sides[0].grad + mixed * 2**-0.5)
    torch.testing.assert_close(made[2].conv.weight.grad, sides[1].grad + mixed * 2**-0.5)
    scales = made[1].conv.parametrizations.weight.original
    torch.testing.assert_close(scales.grad, torch.stack([(mixed * side).sum() for side in sides]))
    assert made[1].norm.weight is not made[0].norm.weight and made[1].norm.weight.grad is not None


def test_the_model_is_not_changed_and_parameters_are_saved() -> None:
    model = chain(7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = replace(model, every=3)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    saved = 2 * (8 * 8 * 9) - 2 * 2  # of the blocks 2 and 5, whose scalars are new
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in made.parameters()) == saved
    again = replace(chain(7), every=3)
    again.load_state_dict(made.state_dict())
    twin = copy.deepcopy(made)
    x = torch.randn(2, 8, 6, 6)
    made.eval(), again.eval(), twin.eval()
    assert torch.equal(made(x), again(x)) and torch.equal(made(x), twin(x))
    with torch.no_grad():  # the copy's replaced block follows the copy's neighbours
        twin[1].conv.weight.zero_()
    assert not torch.equal(made(x), twin(x))


MODELS: dict[str, Any] = {
    "resnet": (lambda: torchvision.models.resnet34(num_classes=5), torch.randn(2, 3, 64, 64)),
    "vit": (lambda: torchvision.models.VisionTransformer(16, 4, 7, 4, 16, 32, num_classes=5),
            torch.randn(2, 3, 16, 16)),
    "chain": (chain, torch.randn(4, 8, 6, 6)),
}


@pytest.mark.parametrize("method", ["glcan", "dgl", "man"])
@pytest.mark.parametrize("kind", MODELS)
def test_trains_under_local_learning_with_its_neighbours(kind: str, method: str) -> None:
    make, x = MODELS[kind]
    made = replace(make(), every=3)
    y = torch.randint(5, (len(x),))
    local = glcan_fx.transform(made, k="natural", task="classification", example_inputs=x, method=method).train()
    assert local.plan.k > 2 and any("stay in one local module" in note for note in local.plan.notes)
    owners: dict[int, set[int]] = {}
    for node in local.graph.nodes:
        if node.meta.get("local_module") is not None and node.op in ("call_module", "get_attr"):
            for p in local.get_submodule(node.target).parameters() if node.op == "call_module" else ():
                owners.setdefault(id(p), set()).add(node.meta["local_module"])
    assert all(len(found) == 1 for found in owners.values())
    for _ in range(2):
        local(x, y).loss.backward()
    missing = [name for name, p in made.named_parameters() if p.grad is None]
    assert not missing
    made.eval(), local.eval()
    with torch.no_grad():
        assert torch.equal(made(x), local(x))


def test_a_row_that_is_replaced_throughout_is_one_local_module() -> None:
    made, x = replace(chain(5), every=2), torch.randn(2, 8, 6, 6)
    assert glcan_fx.plan(made, k="natural", task="classification", example_inputs=x).plan.k == 1
    with pytest.raises(PlanError):
        glcan_fx.plan(made, k=3, task="classification", example_inputs=x)


def test_named_blocks() -> None:
    made = replace(chain(7), blocks=["2"])
    assert isinstance(made[2].conv.weight, Tensor) and not isinstance(made[2].conv._parameters.get("weight"), Tensor)
    assert "weight" in made[1].conv._parameters


@pytest.mark.parametrize(("given", "message"), [
    ({"every": 1}, "every=1"), ({"blocks": ["0"]}, "'0'.*these have: 1, 2"), ({"blocks": ["nothing"]}, "'nothing'"),
    ({"blocks": ["1", "2"]}, "so is its neighbour")])
def test_what_cannot_be_replaced(given: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(chain(4), **given)


def test_nothing_to_replace() -> None:
    with pytest.raises(PlanError, match="no block of Linear"):
        replace(nn.Linear(2, 2))
