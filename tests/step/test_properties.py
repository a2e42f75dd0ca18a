"""What must hold for any network: semantics, isolation, gradients, structure, round trips, memory.

Architectures are drawn by hypothesis (zoo.py); references are plain autograd (reference.py).
"""

import copy
import io
import os
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import gradients, hooked_gradients, isolation, raw_losses, scalar, summed_loss_gradients
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from zoo import CLASSES, FAMILIES, Architecture, ConvNormAct, architectures, criterion

import glcan_fx
from glcan_fx.methods import GLCAN
from glcan_fx.peak_memory import PeakMemory

families = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize(
    "family",
    ["bottleneck", "preactivation", "inline_residual", "recurrent", "unet", "pyramid", "transformer"],
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "k": st.integers(1, 3),
        "head": st.just("full"),
        "depth": st.integers(1, 2),
        "width": st.just(0.5),
    },
)


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis at a bounded cost: the same examples in every run, no shrinking (they are small already).

    GLCAN_FX_EXAMPLES=20 in the environment multiplies their number, for a thorough search.
    """
    return settings(
        max_examples=count * int(os.environ.get("GLCAN_FX_EXAMPLES", "1")),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def compiled(net: Architecture, seed: int = 0, **options: Any) -> glcan_fx.LocalModel:
    torch.manual_seed(seed)
    options = {"k": "natural", **options}
    return glcan_fx.transform(net.build(seed), criterion=criterion, example_inputs=net.example(), **options)


def drawn(data: st.DataObject, net: Architecture) -> glcan_fx.LocalModel:
    """The network compiled with random options, as far as it can be."""
    return accepted(data.draw(OPTIONS), lambda options: compiled(net, **options))[0]


def accepted(options: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]]:
    """Build with options, but for those that may be refused: a k that is not offered, narrow parameters."""
    refusals = {"k": "are not possible", "width": "cannot be built with .*width=0.5"}
    while True:
        try:
            return build(options), options
        except glcan_fx.PlanError as error:
            refused = {name for name, text in refusals.items() if name in options and text in str(error)}
            if not refused:
                raise
            options = {name: value for name, value in options.items() if name not in refused}


def equal(a: Any, b: Any) -> bool:
    """Bit-equality of nested outputs."""
    return all(tree_leaves(tree_map(torch.equal, a, b)))


def step(local: glcan_fx.LocalModel, net: Architecture, batch: int = 3) -> glcan_fx.LocalOutput:
    images, targets = net.batch(batch)
    return local(images, targets)


# ----------------------------------------------------------------------------------------- one training step


@families
@examples(3)
@given(data=st.data())
def test_training_step(family: str, data: st.DataObject) -> None:
    net = data.draw(architectures(family))
    local, plain = drawn(data, net), net.build()
    images, targets = net.batch()

    expected = summed_loss_gradients(local, images, targets)
    counts = batch_counts(local)
    before = {name: p.detach().clone() for name, p in local.named_parameters()}
    out = local(images.clone(), targets)
    out.loss.backward()

    assert_close(out.output, plain(images.clone()), rtol=0, atol=0)
    assert not any(leaf.requires_grad for leaf in tree_leaves(out.output))
    assert len(out.losses) == local.plan.k
    assert_close(out.loss, torch.stack(out.losses).sum())
    assert_statistics_move_once(local, plain, counts)
    assert_gradients_close(gradients(local), expected)
    assert_everything_moves(local, before)
    if net.norm != "none":  # without norms, dead units are not rare in nets as narrow as these
        still = [name for name, grad in expected.items() if not grad.any()]
        assert len(still) <= 0.2 * len(expected), f"dead: {still}"


def batch_counts(local: nn.Module) -> dict[str, int]:
    return {name: int(value) for name, value in local.named_buffers() if name.endswith("num_batches_tracked")}


def assert_statistics_move_once(local: glcan_fx.LocalModel, plain: nn.Module, before: dict[str, int]) -> None:
    """``plain`` has done one step: its statistics are the compiled model's, and auxiliary ones count one."""
    moved = {name: count - before[name] for name, count in batch_counts(local).items()}
    assert {name: count for name, count in moved.items() if not name.startswith("aux.")} == batch_counts(
        plain
    )
    assert all(count == 1 for name, count in moved.items() if name.startswith("aux."))
    for name, buffer in plain.named_buffers():
        assert_close(local.get_buffer(name), buffer, rtol=0, atol=0)


def assert_gradients_close(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    missing = [name for name, grad in actual.items() if grad is None]
    assert not missing
    for name, grad in actual.items():
        assert_close(
            grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_everything_moves(local: glcan_fx.LocalModel, before: dict[str, Tensor], rate: float = 0.5) -> None:
    """The gradients, which are the reference's, reach every parameter through an optimizer."""
    torch.optim.SGD(local.parameters(), lr=rate).step()
    for name, p in local.named_parameters():
        assert torch.equal(p.detach(), before[name].add(p.grad, alpha=-rate)), name


@pytest.mark.parametrize(
    "family", ["chain", "residual", "bottleneck", "grouped", "gated", "inception", "dense"]
)
@examples(2)
@given(data=st.data())
def test_gradients_equal_those_of_the_hooked_original(family: str, data: st.DataObject) -> None:
    net = data.draw(architectures(family))
    local = compiled(net)
    images, targets = net.batch()
    expected = hooked_gradients(local, images, targets, criterion)
    local(images, targets).loss.backward()
    assert len(local.plan.cuts) == len(net.blocks)
    assert_gradients_close(gradients(local), expected)


@families
@examples(2)
@given(data=st.data())
def test_local_losses_reach_only_their_own_parameters(family: str, data: st.DataObject) -> None:
    net = data.draw(architectures(family))
    local = compiled(net)
    inputs = net.batch()
    owned = owned_parameters(local)
    reached = isolation(local, *inputs)
    assert reached == owned
    assert set().union(*reached) == {name for name, _ in local.named_parameters()}
    if family != "recurrent":
        assert sum(map(len, reached)) == len(set().union(*reached)), (
            "a parameter is trained by two local losses"
        )

    parameters = dict(local.named_parameters())
    for loss, names in zip(local(*inputs).losses, owned, strict=True):  # the runtime's, not the raw ones
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
        assert {name for name, grad in zip(parameters, grads, strict=True) if grad is not None} == names


def owned_parameters(local: glcan_fx.LocalModel) -> list[set[str]]:
    """Names of the parameters of each local module, from the graph."""
    owned: list[set[str]] = [set() for _ in local.plan.modules]
    everything = {id(p): name for name, p in local.named_parameters()}
    for node in local.graph.nodes:
        if "local_module" not in node.meta:
            continue
        names = owned[node.meta["local_module"]]
        if node.op == "call_module":
            names.update(everything[id(p)] for p in local.get_submodule(node.target).parameters())
        elif node.op == "get_attr":
            owner, _, attribute = node.target.rpartition(".")
            names.add(everything[id(getattr(local.get_submodule(owner), attribute))])
    for index, names in enumerate(owned[:-1]):
        names.update(name for name in everything.values() if name.startswith(f"aux.{index}."))
    return owned


@pytest.mark.parametrize("family", ["residual", "unet", "pyramid"])
def test_a_local_loss_does_not_depend_on_later_modules(family: str) -> None:
    net = Architecture(family, 8, ((8, 2), (8, 1), (12, 2)))
    local = compiled(net)
    inputs = net.batch()
    before = [loss.item() for loss in raw_losses(local, *inputs)]
    for index, names in enumerate(owned_parameters(local)):
        other = copy.deepcopy(local)
        with torch.no_grad():
            for name in names:
                other.get_parameter(name).add_(torch.randn_like(other.get_parameter(name)))
        after = [loss.item() for loss in raw_losses(other, *inputs)]
        assert after[:index] == before[:index]
        assert after[index] != before[index]


# ------------------------------------------------------------------------------------- evaluation, structure


@families
@examples(2)
@given(data=st.data())
def test_evaluation_is_the_original_and_structure_is_complete(family: str, data: st.DataObject) -> None:
    net = data.draw(architectures(family))
    local, plain = drawn(data, net), net.build()
    assert_evaluates_as(local, plain, net)
    assert_every_node_in_one_module(local, net)
    assert_state_dict_extends(local, plain)


def assert_evaluates_as(local: glcan_fx.LocalModel, plain: nn.Module, net: Architecture) -> None:
    def fail(module: nn.Module, *_: Any) -> None:
        raise AssertionError(f"auxiliary code ran in evaluation: {type(module).__name__}")

    handles = [module.register_forward_pre_hook(fail) for module in local.aux.modules()]
    images, _ = net.batch()
    assert equal(local.eval()(images.clone()), plain.eval()(images.clone()))
    for handle in handles:
        handle.remove()


def assert_every_node_in_one_module(local: glcan_fx.LocalModel, net: Architecture) -> None:
    """Every layer is called as often as in the model, by one local module after the other."""
    images, targets = net.batch()
    assert layer_calls(local, lambda: step(local, net)) == layer_calls(
        plain := net.build(), lambda: plain.train()(images.clone()))
    k = local.plan.k
    order = [node.meta["local_module"] for node in local.graph.nodes if "local_module" in node.meta]
    assert len(set(local.plan.natural)) == len(local.plan.natural), "two split points of one name"
    assert len(set(local.plan.cuts)) == k - 1
    assert sorted(set(order)) == list(range(k))
    assert order == sorted(order), "local modules stand one after the other"
    parts = [name for name, _ in local.aux.named_children() if name.isdigit()]
    assert parts == [str(index) for index in range(k - 1)]
    calls = [node.target for node in local.graph.nodes if str(node.target).startswith("aux.") and k > 1]
    assert [call for call in calls if call.rpartition(".")[2].isdigit()] == [f"aux.{index}" for index in range(k - 1)]


def layer_calls(model: nn.Module, run: Callable[[], Any]) -> Counter[str]:
    """How often every layer with parameters runs."""
    calls: Counter[str] = Counter()
    layers = [(name, part) for name, part in model.named_modules()
              if part._parameters and not part._modules and not name.startswith("aux.")]
    handles = [part.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, part in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def assert_state_dict_extends(local: glcan_fx.LocalModel, plain: nn.Module) -> None:
    added = set(local.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(local.state_dict())
    assert all(key.startswith("aux.") for key in added)
    everything = [id(p) for _, p in local.named_parameters(remove_duplicate=False)]
    assert len(everything) == len(set(everything))
    assert {id(p) for p in local.original.parameters()} <= set(everything)
    own, new = (group["params"] for group in local.parameter_groups(lr=1.0))
    assert [id(p) for p in own] == [id(p) for p in local.original.parameters()]
    assert {id(p) for p in own} | {id(p) for p in new} == set(everything)
    assert len(own) + len(new) == len(everything)


# ----------------------------------------------------------------------------------------------- round trips


@some_families
@examples(2)
@given(data=st.data())
def test_round_trips(family: str, data: st.DataObject) -> None:
    net = data.draw(architectures(family))
    local = drawn(data, net)
    step(local, net).loss.backward()  # running statistics that are not the initial ones
    local.zero_grad()

    other = glcan_fx.transform(net.build(seed=5), plan=local.plan)
    assert not torch.equal(scalar(step(other, net).losses), scalar(step(local, net).losses))
    other.load_state_dict(saved(local.state_dict(), weights_only=True))
    for twin in (copy.deepcopy(local), saved(local, weights_only=False), other):
        assert {id(t) for t in tensors(twin)}.isdisjoint(id(t) for t in tensors(local))
        assert twin.plan == local.plan
        assert_same_behaviour(local, twin, net)


def saved(value: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def assert_same_behaviour(a: glcan_fx.LocalModel, b: glcan_fx.LocalModel, net: Architecture) -> None:
    """Same state, and two equal training steps and predictions from here on."""
    assert equal(dict(a.state_dict()), dict(b.state_dict()))
    assert [m.training for m in a.original.modules()] == [m.training for m in b.original.modules()]
    state = copy.deepcopy(a.state_dict())
    for _ in range(2):
        one, two = step(a, net), step(b, net)
        assert equal(one.output, two.output)
        assert equal(one.losses, two.losses)
        for out, local in ((one, a), (two, b)):
            local.zero_grad()
            out.loss.backward()
            torch.optim.SGD(local.parameters(), lr=0.01).step()
    assert equal(dict(a.state_dict()), dict(b.state_dict()))
    images, _ = net.batch()
    assert equal(a.eval()(images.clone()), b.eval()(images.clone()))
    a.train().load_state_dict(state)


@some_families
@examples(2)
@given(data=st.data())
def test_plan_round_trip_and_untouched_model(family: str, data: st.DataObject) -> None:
    net = data.draw(architectures(family))
    given = {"k": "natural", "criterion": criterion, "example_inputs": net.example()}
    choices = data.draw(OPTIONS)
    model = net.build().train(data.draw(st.booleans()))
    with untouched(model):
        plan, options = accepted(choices, lambda options: glcan_fx.plan(model, **given | options))
    again = glcan_fx.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan.plan)
    with untouched(model):
        locals_ = [
            glcan_fx.transform(model, criterion=criterion, plan=again),
            glcan_fx.transform(model, plan=plan),
            glcan_fx.transform(model, **given | options),
        ]
    assert {local.plan.cuts for local in locals_} == {plan.cuts}
    assert len({local.code for local in locals_}) == 1
    assert all(local.training is model.training and local.original is model for local in locals_)
    assert all(local.aux.training is model.training for local in locals_)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Nothing of a model, and no random state, is different afterwards; also when the block raises."""
    before = portrait(model)
    try:
        yield
    finally:
        after = portrait(model)
        for key, value in before.items():
            assert equal(value, after[key]) if isinstance(value, Tensor | list) else value == after[key], key


def portrait(model: nn.Module) -> dict[str, Any]:
    modules = list(model.modules())
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "random": torch.get_rng_state(),
        "python random": repr(random.getstate()),
        "values": [tensor.detach().clone() for _, tensor in named],
        "tensors": repr([(n, id(t), t._version, t.requires_grad, t.grad is None) for n, t in named]),
        "modules": repr([(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)]),
        "attributes": repr([{k: id(v) for k, v in vars(m).items() if k != "training"} for m in modules]),
        "hooks": repr([{k: list(v) for k, v in vars(m).items() if k.endswith("_hooks")} for m in modules]),
    }


class Undecided(nn.Module):
    """Cannot be captured: its last layer asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x * 2 if x.sum() > 0 else x


SMALL = Architecture("residual", 4, ((4, 1), (8, 2)))


@pytest.mark.parametrize(
    "options",
    [
        {"k": 17},
        {"k": 0},
        {"k": True},
        {"k": "finest"},
        {"k": 2.5},
        {"k": ["no.such"]},
        {"k": ["blocks.1"]},
        {"k": ["fc"]},
        {"head": "heavy"},
        {"depth": -1},
        {"width": 0},
        {"width": 2},
        {"example_inputs": None},
        {"task": "poetry", "criterion": None},
        {"criterion": None},
        {"criterion": "cross_entropy"},
        {"example_inputs": torch.empty(2, 5, 16, 16)},
    ],
    ids=lambda options: " ".join(options),
)
def test_untouched_when_refused(options: dict[str, Any]) -> None:
    model = SMALL.build().eval()
    model.stem.register_forward_hook(lambda *_: None)
    for call in (glcan_fx.plan, glcan_fx.transform):
        with untouched(model), pytest.raises(glcan_fx.GlcanFxError):
            call(model, **{"criterion": criterion, "example_inputs": SMALL.example(), **options})


def test_untouched_when_not_captured() -> None:
    model = Undecided()
    for call in (glcan_fx.plan, glcan_fx.transform):
        with untouched(model), pytest.raises(glcan_fx.TraceError, match="body|Undecided"):
            call(model, criterion=criterion, example_inputs=SMALL.example())


def test_plan_of_another_model_is_refused() -> None:
    plan = glcan_fx.plan(SMALL.build(), k="natural", criterion=criterion, example_inputs=SMALL.example())
    other = Architecture("residual", 4, ((4, 1),)).build()
    with untouched(other), pytest.raises(glcan_fx.PlanError, match="another model"):
        glcan_fx.transform(other, plan=plan)


def test_plain_checkpoint_loads_strictly() -> None:
    local = compiled(SMALL)
    aux = {key: value.clone() for key, value in local.aux.state_dict().items()}
    plain = SMALL.build(seed=3)
    local.load_state_dict(saved(plain.state_dict(), weights_only=True), strict=True)
    assert equal(dict(local.original.state_dict()), dict(plain.state_dict()))
    assert equal(dict(local.original_state_dict()), dict(plain.state_dict()))
    assert equal(dict(local.aux.state_dict()), aux)
    with pytest.raises(RuntimeError, match="fc.weight"):
        local.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "fc.weight"})


# ----------------------------------------------------------------------------------------------------- sizes


@families
@examples(2)
@given(data=st.data())
def test_other_batch_and_image_sizes(family: str, data: st.DataObject) -> None:
    net = data.draw(architectures(family))
    local, plain = drawn(data, net), net.build()
    sizes = [net.size]
    if net.resizable:
        sizes += [(net.size[0] + 5, net.size[1] + 8), (net.size[0] + 16, net.size[1] - 2)]
    for size in sizes:
        images, targets = net.batch(5, size)
        with predictions(local) as predicted:
            out = local(images.clone(), targets)
        out.loss.backward()
        assert_close(out.output, plain(images.clone()), rtol=0, atol=0)
        assert len(predicted) == local.plan.k - 1
        for prediction in predicted:
            assert tree_map(lambda t: t.shape, prediction) == tree_map(lambda t: t.shape, out.output)


@contextmanager
def predictions(local: glcan_fx.LocalModel) -> Iterator[list[Any]]:
    """Collects what the auxiliary networks return."""
    found: list[Any] = []
    handles = [
        local.aux.get_submodule(f"{index}.network").register_forward_hook(
            lambda *call: found.append(call[-1])
        )
        for index in range(local.plan.k - 1)
    ]
    yield found
    for handle in handles:
        handle.remove()


# ----------------------------------------------------------------------------------------- number of modules


@families
def test_one_module_is_plain_backpropagation(family: str) -> None:
    net = Architecture(family, 4, ((4, 1), (8, 2), (8, 1)), variant=1)
    local, plain = compiled(net, k=1), net.build()
    images, targets = net.batch()
    out = local(images, targets)
    out.loss.backward()
    loss = scalar(criterion(plain(images), targets))
    loss.backward()
    assert torch.equal(out.loss.detach(), loss.detach())
    assert not list(local.aux.parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(local.get_parameter(name).grad, p.grad), name


def four_blocks(family: str, **changes: Any) -> Architecture:
    flat = family in ("transformer", "denoiser")
    return Architecture(family, 8, ((8, 1),) * 4 if flat else ((8, 1), (8, 2), (8, 1), (12, 2)), **changes)


@pytest.mark.parametrize("family", ["inline_residual", "unet", pytest.param("pyramid", marks=pytest.mark.slow),
                                    "transformer"])
def test_merging_gives_contiguous_modules(family: str) -> None:
    net = four_blocks(family)
    model = net.build()
    natural = glcan_fx.plan(model, k="natural", criterion=criterion, example_inputs=net.example())
    assert natural.k == len(natural.natural) + 1 >= 4
    assert natural.cuts == natural.natural
    units = [block.name for module in natural.modules for block in module.blocks]
    assert len(units) == natural.k
    for k in range(1, natural.k + 1):
        plan = glcan_fx.plan(model, k=k, criterion=criterion, example_inputs=net.example())
        assert plan.k == k
        assert [block.name for module in plan.modules for block in module.blocks] == units
        assert set(plan.cuts) <= set(natural.natural)
        assert all(module.blocks[-1].name == module.cut for module in plan.modules[:-1])
        assert sum(m.parameters for m in plan.modules) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("k", [2, 3])
@some_families
def test_any_number_of_modules_trains(family: str, k: int) -> None:
    net = four_blocks(family, act="functional", norm="group")
    local = compiled(net, k=k)
    inputs = net.batch()
    expected = summed_loss_gradients(local, *inputs)
    out = local(*inputs)
    out.loss.backward()
    assert len(out.losses) == k
    assert_gradients_close(gradients(local), expected)


@examples(3)
@given(data=st.data())
def test_explicit_split_points(data: st.DataObject) -> None:
    net = data.draw(architectures(data.draw(st.sampled_from(["chain", "residual", "unet", "pyramid"]))))
    natural = glcan_fx.plan(net.build(), k="natural", criterion=criterion, example_inputs=net.example()).natural
    chosen = data.draw(st.lists(st.sampled_from(natural), unique=True))
    local, plain = compiled(net, k=chosen), net.build()
    assert local.plan.cuts == tuple(name for name in natural if name in chosen)
    images, targets = net.batch()
    expected = summed_loss_gradients(local, images, targets)
    out = local(images.clone(), targets)
    out.loss.backward()
    assert equal(out.output, plain(images.clone()))
    assert_gradients_close(gradients(local), expected)


def test_split_points_inside_a_block_and_by_other_names() -> None:
    net = Architecture("chain", 8, ((8, 1), (8, 2), (8, 1)))
    local, plain = compiled(net, k=["blocks.1.conv", "stem.0.conv"]), net.build()
    assert local.plan.cuts == ("stem.0.conv", "blocks.1.conv")
    images, targets = net.batch()
    expected = summed_loss_gradients(local, images, targets)
    out = local(images, targets)
    out.loss.backward()
    assert equal(out.output, plain(images))
    assert_gradients_close(gradients(local), expected)


def test_too_many_modules_names_the_split_points() -> None:
    model = SMALL.build()
    natural = glcan_fx.plan(model, k="natural", criterion=criterion, example_inputs=SMALL.example()).natural
    assert natural == ("stem", "blocks.0")
    with pytest.raises(glcan_fx.PlanError) as error:
        glcan_fx.plan(model, k=4, criterion=criterion, example_inputs=SMALL.example())
    assert all(name in str(error.value) for name in natural)
    assert "k=4" in str(error.value) and "1 to 3" in str(error.value)


# ---------------------------------------------------------------------------------------- natural partitions


@pytest.mark.parametrize(
    ("name", "k"), [("resnet18", 9), ("resnet34", 17), ("resnet50", 17), ("resnet101", 34), ("resnet152", 51)]
)
def test_natural_partition_of_resnets_is_the_papers(name: str, k: int) -> None:
    assert natural_partition(name, 64) == k


def test_natural_partition_of_a_resnet_on_tiny_images() -> None:
    """The last stage works on a single place."""
    assert natural_partition("resnet18", 32) == 9


def natural_partition(name: str, pixels: int) -> int:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=4)
    example = torch.empty(2, 3, pixels, pixels)
    plan = glcan_fx.plan(model, k="natural", task="classification", example_inputs=example,
                         method=GLCAN(head="lean", width=0.25, hidden=0))
    blocks = [f"layer{i}.{j}" for i in range(1, 5) for j in range(len(model.get_submodule(f"layer{i}")))]
    assert plan.cuts == ("maxpool", *blocks[:-1])
    return plan.k


@pytest.mark.parametrize(
    ("detector", "name", "k"),
    [
        ("RetinaNet", "resnet18", 9),
        *(
            pytest.param(detector, name, k, marks=pytest.mark.slow)  # together longer than 20 seconds
            for detector in ("RetinaNet", "FCOS", "FasterRCNN")
            for name, k in (("resnet18", 9), ("resnet34", 17), ("resnet50", 17))
            if (detector, name) != ("RetinaNet", "resnet18")
        ),
    ],
)
def test_natural_partition_of_detectors_is_the_papers(detector: str, name: str, k: int) -> None:
    dense = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    options = {} if detector == "FasterRCNN" else dense
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=5, **options)
    model = getattr(torchvision.models.detection, detector)(backbone, num_classes=4)
    plan = glcan_fx.plan(model, k="natural", task="detection", example_inputs=torch.empty(2, 3, 128, 128))
    assert plan.k == k
    assert all(cut.startswith("backbone.body.") for cut in plan.cuts)


# --------------------------------------------------------------------------------------- memory as structure


class Kept:
    """What autograd holds instead of a tensor that it saved for backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("head", ["light", "full"])
@pytest.mark.parametrize("family", ["chain", "inline_dense", "supervised", "unet", "pyramid", "transformer"])
def test_nothing_saved_for_backward_outlives_its_module(
    family: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = four_blocks(family, norm="layer", act="functional")
    local = compiled(net, head=head)
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    seen: list[tuple[int, int]] = []  # at each boundary: saved in this module, still kept
    count = 0

    def pack(tensor: Tensor) -> Kept:
        nonlocal count
        count += 1
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    def boundary(*_: Any) -> None:
        nonlocal count
        seen.append((count, len(alive)))
        count = 0

    for index in range(local.plan.k - 1):
        local.aux.get_submodule(f"{index}.backward").register_forward_hook(boundary)
    hooks = saved_tensors_hooks(pack, lambda kept: kept.tensor)
    monkeypatch.setattr("glcan_fx.step.local_model.private_graph", lambda: hooks)
    out = step(local, net)
    assert len(seen) == local.plan.k - 1
    assert all(saved > 3 and kept == 0 for saved, kept in seen), seen
    assert len(alive) == 0  # of the last module, too
    out.loss.backward()


def deep_chain() -> tuple[nn.Module, Architecture]:
    net = Architecture("chain", 8, ((8, 1),) * 16, act="functional", size=(64, 64))
    return net.build(), net


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(-(-t.nbytes // 512) * 512 for t in tensors)


def test_at_boundaries_live_gradients_and_one_activation() -> None:
    model, net = deep_chain()
    local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=net.example())
    images, targets = net.batch(4)
    owned = owned_parameters(local)
    activation = images[:, :1].nbytes * 8 // 4  # 8 channels at stride 2
    live: list[int] = []
    with PeakMemory(local) as memory:
        start = memory.live
        for index in range(local.plan.k - 1):
            boundary = local.aux.get_submodule(f"{index}.backward")
            boundary.register_forward_hook(lambda *_: live.append(memory.live))
        local(images, targets)
    assert len(live) == 16
    done: set[str] = set()
    for index, (now, names) in enumerate(zip(live, owned, strict=False)):
        done |= names
        grads = nbytes(local.get_parameter(name) for name in done)
        small = 512 * 8 * (index + 2)  # losses and logits
        assert now - start <= grads + activation + small, f"at the boundary of module {index}"


def test_peak_of_a_deep_chain_is_a_fraction_of_backpropagations() -> None:
    def peak(compiled: bool) -> int:
        model, net = deep_chain()
        if compiled:
            model = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=net.example())
        images, targets = net.batch(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with PeakMemory(model, optimizer) as memory:
            loss = model(images, targets).loss if compiled else criterion(model(images), targets)
            loss.backward()
            optimizer.step()
        return memory.bytes

    assert peak(compiled=True) < 0.3 * peak(compiled=False)


@pytest.mark.parametrize("family", ["chain", "unet", "pyramid"])
def test_after_a_step_only_gradients_are_left(family: str) -> None:
    net = four_blocks(family, size=(32, 32))
    local = compiled(net)
    with PeakMemory(local) as memory:
        start = memory.live
        step(local, net).loss.backward()
    assert 0 < memory.live - start <= nbytes(local.parameters()) + 4096


# ------------------------------------------------------------------------------------------------ found once


class Small(nn.Module):
    """Three blocks and a linear layer; subclasses say what is special."""

    def __init__(self) -> None:
        super().__init__()
        net = Architecture("chain", 8, ())
        self.a = ConvNormAct(net, 3, 8, 2)
        self.b = ConvNormAct(net, 8, 8, 2)
        self.c = ConvNormAct(net, 8, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.c(self.b(self.a(x))).mean((2, 3)))


class WithoutAssignment(Small):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a.conv(x)
        self.act(x)
        x = self.b.conv(x)
        x.mul_(2)
        return self.fc(self.c(x).mean((2, 3)))


class InPlaceHead(Small):
    """A head in the middle rectifies in place what the next block reads."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.early = nn.Sequential(nn.SiLU(inplace=True), pool, nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.a.conv(x)
        early = self.early(x)
        return {"early": early, "late": self.fc(self.c(self.b(x)).mean((2, 3)))}


class OneActivation(Small):
    """Every split point is the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.a, self.b, self.c):
            x = self.relu(block.conv(x))
        return self.fc(x.mean((2, 3)))


class PlainTensor(Small):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.full((1, 3, 1, 1), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean)


@pytest.mark.parametrize("kind", [Small, WithoutAssignment, InPlaceHead, OneActivation, PlainTensor])
def test_special_forward_passes(kind: type[Small]) -> None:
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    with untouched(model):
        local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=SMALL.example())
    assert local.plan.k == 3
    assert {node.meta.get("local_module") for node in local.graph.nodes} >= {0, 1, 2}
    images, targets = SMALL.batch()
    for _ in range(2):
        expected = summed_loss_gradients(local, images, targets)
        local.zero_grad()
        out = local(images, targets)
        out.loss.backward()
        assert equal(out.output, plain(images))
        assert_gradients_close(gradients(local), expected)
    for name, buffer in plain.named_buffers():
        assert torch.equal(local.get_buffer(name), buffer), name
    assert equal(local.eval()(images), plain.eval()(images))


class Keeper(Small):
    """Keeps intermediate maps on itself, as models with attention maps do."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.maps.append(x)
        return self.fc(self.c(self.b(x)).mean((2, 3)))


def test_tracing_leaves_the_models_own_lists_alone() -> None:
    model = Keeper()
    glcan_fx.plan(model, k="natural", criterion=criterion, example_inputs=SMALL.example())
    assert model.maps == []


def test_global_residual_can_be_cut() -> None:
    net = Architecture("denoiser", 8, ((8, 1),) * 3, variant=1)
    assert net.build().subtract
    plan = glcan_fx.plan(net.build(), k="natural", criterion=criterion, example_inputs=net.example())
    assert plan.cuts[:3] == ("stem", "body.0", "body.1")


class Noise(nn.Module):
    """All layers in one container, and the difference outside of it."""

    def __init__(self) -> None:
        super().__init__()
        net = Architecture("chain", 8, ())
        blocks = [ConvNormAct(net, inputs, 8) for inputs in (3, 8, 8)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.net(x)


def test_residual_around_one_container_can_be_cut() -> None:
    plan = glcan_fx.plan(Noise(), k="natural", criterion=criterion, example_inputs=SMALL.example())
    assert plan.cuts[:2] == ("net.0", "net.1")


@pytest.mark.parametrize("tokens", [4, 9, 16, 64, 400])
def test_attention_is_no_hourglass(tokens: int) -> None:
    side = 4 * round(tokens**0.5)
    for variant in (0, 1):
        net = Architecture("transformer", 8, ((8, 1),) * 3, size=(side, side), variant=variant)
        plan = glcan_fx.plan(net.build(), k="natural", criterion=criterion, example_inputs=net.example())
        assert plan.cuts[-2:] == ("blocks.0", "blocks.1")


@pytest.mark.parametrize("act", ["inplace", "functional_inplace", "method_inplace", "silu_inplace"])
def test_copied_blocks_may_begin_in_place(act: str) -> None:
    net = Architecture("preactivation", 8, ((8, 1),) * 4, norm="none", act=act)
    local, plain = compiled(net, depth=2), net.build()
    images, targets = net.batch()
    expected = summed_loss_gradients(local, images, targets)
    out = local(images, targets)
    out.loss.backward()
    assert equal(out.output, plain(images))
    assert_gradients_close(gradients(local), expected)


def test_light_heads_keep_the_predictor() -> None:
    net = Architecture("residual", 8, ((8, 1), (CLASSES, 2)))  # as many features as classes
    local = compiled(net)
    for index in range(local.plan.k - 1):
        assert [m for m in local.aux.get_submodule(f"{index}.network").modules() if isinstance(m, nn.Linear)]


class Embedding(Small):
    """Nothing with weights follows the trunk: the features themselves are the output."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("family", ["super_resolution", "denoiser", "unet", "embedding"])
def test_narrow_networks_predict_in_full_width(family: str, width: float) -> None:
    net = Architecture(family, 8, ((8, 1),) * 2)
    model = Embedding() if family == "embedding" else net.build()
    local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=net.example(),
                               method=GLCAN(width=width))
    with predictions(local) as predicted:
        out = step(local, net)
    assert [found.shape for found in predicted] == [out.output.shape] * (local.plan.k - 1)


@pytest.mark.parametrize("family", ["residual", "inline_residual"])
def test_square_maps_of_as_many_channels_keep_their_layout(family: str) -> None:
    """LayerNorm2d permutes inside: a map of 4 x 4 places and 4 channels does not tell which axis is which."""
    net = Architecture(family, 8, ((8, 1), (4, 2)), norm="layer", size=(15, 15))
    local, plain = compiled(net), net.build()
    images, targets = net.batch(5, (20, 23))
    with predictions(local) as predicted:
        out = local(images, targets)
    assert equal(out.output, plain(images))
    assert [found.shape for found in predicted] == [out.output.shape] * (local.plan.k - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_auxiliary_networks_have_the_models_dtype(dtype: torch.dtype) -> None:
    net = Architecture("residual", 8, ((8, 1), (12, 2)))
    model = net.build().to(dtype)
    local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=net.example().to(dtype))
    assert {p.dtype for p in local.parameters()} == {dtype}
    images, targets = net.batch()
    out = local(images.to(dtype), targets)
    out.loss.backward()
    assert out.output.dtype == dtype


def test_copies_keep_parts_that_are_in_evaluation_mode() -> None:
    local = compiled(SMALL)
    local.original.stem.eval()  # frozen statistics
    modes = [module.training for module in local.original.modules()]
    for twin in (copy.deepcopy(local), saved(local, weights_only=False)):
        assert [module.training for module in twin.original.modules()] == modes
        assert_same_behaviour(local, twin, SMALL)
        local.original.stem.eval()


class Temperature(nn.Module):
    """A criterion with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.scale, targets)


def test_copies_of_a_learned_criterion_are_independent() -> None:
    learned = Temperature()
    local = glcan_fx.transform(SMALL.build(), k="natural", criterion=learned, example_inputs=SMALL.example())
    expected = summed_loss_gradients(local, *SMALL.batch())
    for twin in (local, copy.deepcopy(local), saved(local, weights_only=False)):
        learned.scale.grad = None
        twin.zero_grad()
        step(twin, SMALL).loss.backward()
        assert_gradients_close(gradients(twin), expected)
        assert (learned.scale.grad is None) == (twin is not local)


def test_detectors_can_be_copied_and_pickled() -> None:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    anchors = AnchorGenerator(((16,),) * 5, ((1.0,),) * 5)
    model = RetinaNet(backbone, 3, min_size=64, max_size=64, anchor_generator=anchors)
    local = glcan_fx.transform(model, k=2, task="detection", example_inputs=torch.empty(2, 3, 64, 64))
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    twins = [copy.deepcopy(local), saved(local, weights_only=False)]
    losses = local(images, [target, target])
    for twin in twins:
        assert equal(twin(images, [target, target]), losses)


class SideInputs(Small):
    def forward(self, x: Tensor, side: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        x = self.b(self.a(x)) + side[0] + side[1]["bias"]
        return self.fc(self.c(x).mean((2, 3)))


def test_plan_with_nested_inputs_round_trips() -> None:
    one = torch.empty(2, 8, 1, 1)
    inputs = (SMALL.example(), (one, {"bias": one}))
    plan = glcan_fx.plan(SideInputs(), k="natural", criterion=criterion, example_inputs=inputs)
    assert glcan_fx.Plan.from_json(plan.to_json()) == plan


class Scaled(Small):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return super().forward(x) * scale


class Masked(Small):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


@pytest.mark.parametrize("kind", [Scaled, Masked])
def test_targets_follow_the_inputs_of_the_example(kind: type[Small]) -> None:
    """Arguments that the example leaves out keep their defaults."""
    local = glcan_fx.transform(kind(), k="natural", criterion=criterion, example_inputs=SMALL.example())
    images, targets = SMALL.batch()
    out = local(images, targets)
    assert equal(out.output, local.original(images))
    assert equal(out.losses, local(images, targets=targets).losses)


def test_what_an_auxiliary_network_costs_depends_on_what_is_left_of_a_perceptron() -> None:
    """Regression: all layers output the same shape, and their auxiliary networks differ."""
    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.relu(self.norm(self.linear(x)))

    model = nn.Sequential(*(Layer(32) for _ in range(5)), nn.Linear(32, 10))
    plan = glcan_fx.plan(model, k="natural", task="classification", example_inputs=torch.empty(4, 32))
    local = glcan_fx.transform(model, plan=plan)
    real = [sum(p.numel() for p in local.aux.get_submodule(str(i)).parameters()) for i in range(plan.k - 1)]
    assert [module.aux_parameters for module in plan.modules[:-1]] == real and len(set(real)) > 1
