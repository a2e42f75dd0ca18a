"""Models that compute their own loss, from labels among their arguments."""
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import glcan_fx
from glcan_fx import PlanError
from glcan_fx.errors import CriterionError

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])
EXAMPLE = {"x": torch.empty(4, 3, 16, 16), "labels": torch.zeros(4, dtype=torch.long)}


@dataclass
class Output:
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class Classifier(nn.Module):
    """gives: how the loss is returned; asks: its loss asks about values, which a graph cannot hold."""

    def __init__(self, gives: str = "object", asks: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.gives, self.asks = gives, asks
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x, labels=None):
        logits = self.fc(self.blocks(self.stem(x)).mean((2, 3)))
        if labels is None:
            return Output(None, logits)
        if self.asks and (labels < 0).any():
            raise ValueError("a negative label")
        loss = F.cross_entropy(logits, labels)
        given: dict[str, Any] = {
            "object": Output(loss, logits), "dict": {"loss": loss, "logits": logits}, "tuple": (loss, logits),
            "scalar": loss}
        return given[self.gives]


@pytest.mark.parametrize("gives", ["object", "dict", "tuple", "scalar"])
def test_every_local_module_learns_from_the_models_own_loss(gives):
    local = glcan_fx.transform(Classifier(gives), k="natural", task="own_loss", example_inputs=EXAMPLE).train()
    assert local.plan.k >= 5
    out = local(x=IMAGES, labels=LABELS)
    assert len(out.losses) == local.plan.k and out[0] is out.loss  # what frameworks take
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in local.parameters())


def test_it_is_found_by_itself_and_simulated():
    plan = glcan_fx.plan(Classifier(), k=3, example_inputs=EXAMPLE)
    assert plan.task == "own_loss" and plan.k == 3 and plan.memory.plan.peak > 0
    assert glcan_fx.Plan.from_json(plan.to_json()) == plan
    again = glcan_fx.transform(Classifier(), plan=glcan_fx.Plan.from_json(plan.to_json()))
    assert again.plan.k == 3


def test_one_module_has_the_models_gradients():
    model, reference = Classifier(), Classifier()
    glcan_fx.transform(model, k=1, example_inputs=EXAMPLE).train()(IMAGES, LABELS).loss.backward()
    reference.train()(IMAGES, LABELS).loss.backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_evaluation_is_the_model_with_labels_and_without():
    model = Classifier()
    local = glcan_fx.transform(model, k=3, example_inputs=EXAMPLE).eval()
    model.eval()
    assert torch.equal(local(IMAGES, LABELS).loss, model(IMAGES, LABELS).loss)
    assert local(IMAGES).loss is None and torch.equal(local(IMAGES).logits, model(IMAGES).logits)


def test_an_argument_may_be_called_targets():
    class Named(Classifier):
        def forward(self, x, targets):
            return super().forward(x, targets)

    local = glcan_fx.transform(Named(), k=3, task="own_loss", example_inputs=(IMAGES, LABELS)).train()
    local(IMAGES, targets=LABELS).loss.backward()
    local.eval()(IMAGES, LABELS)
    with pytest.raises(PlanError, match="targets"):
        glcan_fx.plan(Named(), criterion=lambda out, _: out.loss, example_inputs=(IMAGES, LABELS))


def test_a_loss_that_asks_about_values_runs_as_python_behind_the_trunk():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = Classifier().blocks, nn.Linear(8, 4)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x, labels):
            logits = self.fc(self.body(self.stem(x)).mean((2, 3)))
            if (labels < 0).any():
                raise ValueError("a negative label")
            return {"loss": F.cross_entropy(logits, labels)}

    local = glcan_fx.transform(Wrapped(), k=3, example_inputs={"x": IMAGES, "labels": LABELS}).train()
    assert local.plan.k == 3
    local(x=IMAGES, labels=LABELS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in local.parameters())


def test_without_a_loss_it_says_what_to_pass():
    example = {"x": EXAMPLE["x"]}
    with pytest.raises(PlanError, match=r"task= or criterion= is required.*own_loss"):
        glcan_fx.plan(Classifier(), example_inputs=example)
    with pytest.raises(CriterionError, match=r"labels.*among example_inputs="):
        glcan_fx.plan(Classifier(), task="own_loss", example_inputs=example)


def test_decoupled_greedy_learning_cannot_compute_it():
    with pytest.raises(PlanError, match="method='dgl' predicts what the model returns"):
        glcan_fx.plan(Classifier(), k=3, method="dgl", example_inputs=EXAMPLE)
