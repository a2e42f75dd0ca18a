"""What holds for every method: each of these kills a fault that public code of the family has."""

import copy
import io
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import glcan_fx
from glcan_fx import PlanError, methods
from glcan_fx.methods import DGL, GLCAN, HPFF, MAN, METHODS, MLAAN, SGR, AugLocal, InfoPro, Method, PredSim
from glcan_fx.models import retinanet
from glcan_fx.plans.plan import Plan
from glcan_fx.step.local_model import LocalModel


class Net(nn.Module):
    """Residual blocks of three widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16, 2), Block(16, 16), Block(16, 16), Block(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        same = (inputs, stride) == (outputs, 1)
        self.other = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.other(x) + self.norm(self.conv(x)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([Block(8, 8, 2), Block(8, 16, 2), Block(16, 16, 2)])
        self.up = nn.ModuleList([Block(32, 16), Block(24, 8), Block(16, 8)])
        self.predict = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for block in self.down:
            skips.append(x)
            x = block(x)
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([nn.functional.interpolate(x, size=skip.shape[-2:]), skip], 1))
        return self.predict(x)


def vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(16, 4, 4, 4, 16, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # it begins at zero, which gives nothing else a gradient
    return model


TARGET = {"boxes": torch.tensor([[10.0, 12.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
NETS: dict[str, Any] = {
    "resnet": ("classification", Net, lambda: (torch.randn(6, 3, 16, 16), torch.randint(5, (6,)))),
    "vit": ("classification", lambda: vit(),
            lambda: (torch.randn(4, 3, 16, 16), torch.randint(5, (4,)))),
    "swin": ("classification", lambda: torchvision.models.SwinTransformer([2, 2], 16, [2, 2], [2, 2], [4, 4],
                                                                          num_classes=5),
             lambda: (torch.randn(2, 3, 16, 16), torch.randint(5, (2,)))),
    "unet": ("segmentation", UNet, lambda: (torch.randn(2, 3, 32, 32), torch.randint(3, (2, 32, 32)))),
    "retinanet": ("detection", lambda: retinanet(18, num_classes=3, min_size=64, max_size=64),
                  lambda: ([torch.rand(3, 64, 64)] * 2, [TARGET] * 2)),
}
ALL: dict[str, Method] = {
    "glcan": GLCAN(), "ahead": GLCAN(ahead=1), "window": GLCAN(window=2), "dgl": DGL(), "auglocal": AugLocal(),
    "infopro": InfoPro(), "predsim": PredSim(), "man": MAN(), "man on dgl": MAN(base="dgl", scaled=False),
    "man on infopro": MAN(base="infopro"), "hpff": HPFF(), "hpff on dgl": HPFF(base="dgl"), "mlaan": MLAAN(),
    "sgr": SGR(), "hpff on man": HPFF(base=MAN(base="dgl"))}
CASES = [pytest.param(net, method, marks=[pytest.mark.slow] * (net != "resnet" and method not in (
    "glcan", "window", "man", "infopro"))) for net in NETS for method in ALL]
NOT_FOR = {("predsim", "unet"), ("predsim", "retinanet"), ("sgr", "retinanet")}  # PlanError says why


def compiled(net: str, method: str, seed: int = 0) -> tuple[nn.Module, LocalModel, Any]:
    task, make, batch = NETS[net]
    torch.manual_seed(seed)
    model, example = make(), batch()
    local = glcan_fx.transform(model, k="natural", task=task, example_inputs=example[0], method=ALL[method]).train()
    return model, local, [batch() for _ in range(3)]


def total(out: Any) -> Tensor:
    return sum(out.values()) if isinstance(out, dict) else out.loss


def step(local: LocalModel, optimizer: torch.optim.Optimizer, data: Any) -> Any:
    optimizer.zero_grad()
    out = local(*data)
    total(out).backward()
    optimizer.step()
    return out


@pytest.mark.parametrize(("net", "method"), CASES)
def test_every_method(net: str, method: str) -> None:
    if (method, net) in NOT_FOR:
        with pytest.raises(PlanError):
            compiled(net, method)
        return
    model, local, data = compiled(net, method)
    plan = local.plan
    assert plan.k == len(plan.natural) + 1 == 1 + sum(name.isdecimal() for name, _ in local.aux.named_children())
    assert Plan.from_json(plan.to_json()) == plan

    # auxiliary parameters are registered, in the optimizer, and move; nothing of the model stands still
    before = {name: value.detach().clone() for name, value in local.state_dict().items()}
    optimizer = torch.optim.SGD(local.parameters(), 0.05)
    step(local, optimizer, data[0])
    tracked = [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(tracked) <= {1}  # batch statistics move once a step
    out = step(local, optimizer, data[0])  # (twins are alike in the first step, so that their scale gets nothing)
    names = dict(local.named_parameters())
    assert any(name.startswith("aux.0.") for name in names)
    idle = [name for name, p in names.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in idle if "bias" not in name], idle  # (biases in front of a norm)
    still = [name for name, p in names.items() if name.startswith("aux.") and p.dim() > 1 and name not in idle
             and torch.equal(p, before[name])]  # (one number may move by less than a number can)
    assert not still
    # the loss is a number, and its parts have names
    assert torch.isfinite(total(out))
    if method == "infopro" and not isinstance(out, dict):
        assert set(out.losses[0]) == {"task", "reconstruction"}

    # evaluation is the model's
    model.eval(), local.eval()
    with torch.no_grad():
        a, b = model(data[0][0]), local(data[0][0])
    assert torch.equal(a[0]["boxes"], b[0]["boxes"]) if net == "retinanet" else torch.equal(a, b)


@pytest.mark.parametrize("method", ALL)
def test_gradients_stay_in_their_window(method: str) -> None:
    _, local, data = compiled("resnet", method)
    owners = {name: node.meta["local_module"] for node in local.graph.nodes for name, _ in local.named_parameters()
              if node.meta.get("local_module") is not None and name.startswith(f"{node.target}.")}
    out = local(*data[0])
    for index, reach in enumerate(local.plan.reaches):
        local.zero_grad()
        out.losses[index].backward(retain_graph=index < local.plan.k - 1)
        trained = {owners[name] for name, p in local.named_parameters()
                   if name in owners and p.grad is not None and p.grad.abs().sum() > 0}
        assert trained == set(range(reach.first, reach.last + 1))
        beside = {name.split(".")[1] for name, p in local.named_parameters() if name.startswith("aux.")
                  and p.grad is not None}
        assert beside <= {str(index)}


@pytest.mark.parametrize(("net", "method"), [
    pytest.param(net, method, marks=[pytest.mark.slow] * (net == "vit" and method != "ahead"))
    for net in ("resnet", "vit")
    for method in ("window", "ahead", "man", "hpff on man", "mlaan", "infopro", "sgr", "auglocal")])
def test_a_run_goes_on_where_it_stopped(net: str, method: str) -> None:
    def run(local: LocalModel, steps: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [step(local, optimizer, batch).loss.detach() for batch in steps]

    def optimizer(local: LocalModel) -> torch.optim.Optimizer:
        return torch.optim.SGD(local.parameters(), 0.05, momentum=0.9)

    _, local, data = compiled(net, method)
    start = copy.deepcopy(local)
    whole = run(local, data, optimizer(local))

    first = optimizer(start)
    run(start, data[:2], first)
    saved = io.BytesIO()
    torch.save({"model": start.state_dict(), "optimizer": first.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved)
    _, again, _ = compiled(net, method, seed=1)
    again.load_state_dict(state["model"])
    second = optimizer(again)
    second.load_state_dict(state["optimizer"])
    assert torch.equal(run(again, data[2:], second)[0], whole[2])
    for name, value in again.state_dict().items():
        assert torch.equal(value, local.state_dict()[name]), name


@pytest.mark.parametrize("method", [name for name in ALL if name not in ("predsim", "sgr")])
def test_copies_and_pickles_train_alike(method: str) -> None:
    _, local, data = compiled("resnet", method)
    saved = io.BytesIO()
    torch.save(local, saved)
    saved.seek(0)
    others = [copy.deepcopy(local), torch.load(saved, weights_only=False)]
    losses = []
    for one in (local, *others):
        optimizer = torch.optim.SGD(one.parameters(), 0.05)
        losses.append([step(one, optimizer, batch).loss.item() for batch in data])
    assert losses[0] == losses[1] == losses[2]


class TestAverages:
    """The moving average of MAN and MLAAN."""

    def test_moves_towards_its_target_after_each_optimizer_step(self) -> None:
        _, local, data = compiled("resnet", "man")
        averages = local.aux.get_submodule("0.averages")
        follows = averages.__dict__["follows"]
        buffers = dict(local.aux.get_submodule("0.network").named_buffers())
        assert follows and not {f"aux.0.network.{path}" for path in follows} & dict(local.named_parameters()).keys()
        for path, source in follows.items():  # it begins as its target, and not as another block
            assert torch.equal(buffers[path], local.original.get_parameter(source))
        optimizer = torch.optim.SGD(local.parameters(), 0.5)
        kept = {path: value.clone() for path, value in buffers.items()}
        step(local, optimizer, data[0])
        assert all(torch.equal(buffers[path], kept[path]) for path in follows)  # no step has been taken before
        moved_to = {path: local.original.get_parameter(source).detach().clone() for path, source in follows.items()}
        local(*data[0])  # accumulation: the first forward after the step moves it, the second does not
        once = {path: buffers[path].clone() for path in follows}
        local(*data[0])
        for path in follows:
            expected = kept[path] + 0.005 * (moved_to[path] - kept[path])
            torch.testing.assert_close(once[path], expected)
            assert torch.equal(buffers[path], once[path])

    def test_a_fixed_target_is_approached(self) -> None:
        _, local, data = compiled("resnet", "man")
        averages = local.aux.get_submodule("0.averages")
        [path, source], *_ = averages.__dict__["follows"].items()
        target = local.original.get_parameter(source)
        average = dict(local.aux.get_submodule("0.network").named_buffers())[path]
        local(*data[0])
        with torch.no_grad():
            target.add_(1.0)
        distances = []
        for _ in range(3):
            with torch.no_grad():
                target.mul_(1.0)  # counts as a step
            local(*data[0])
            distances.append(float((target - average).norm()))
        assert distances[0] > distances[1] > distances[2] > 0

    def test_a_replaced_block_is_told(self) -> None:
        _, local, data = compiled("resnet", "man")
        local.original.blocks[1] = nn.Sequential(Block(8, 16, 2))
        with pytest.raises(glcan_fx.errors.ModelChangedError):
            local(*data[0])


class TestComposition:
    """Methods are values: they compose, print and say what is wrong."""

    def test_by_name(self) -> None:
        assert set(METHODS) >= {"glcan", "dgl", "auglocal", "infopro", "predsim", "man", "hpff", "mlaan", "sgr"}
        plan = glcan_fx.plan(Net(), k=3, task="classification", example_inputs=torch.empty(4, 3, 16, 16),
                             method="hpff", base=MAN(base=DGL(ahead=1))).plan
        assert plan.method.window == 2 and plan.method.ahead == 1
        assert "MAN: next block" in plan.method.description(()) and "windows of 2" in plan.method.description(())

    def test_several_names(self) -> None:
        assert methods.method_of("hpff+man+dgl", patches=3, momentum=0.9, width=0.5) == HPFF(
            patches=3, base=MAN(momentum=0.9, base=DGL(width=0.5)))
        assert methods.method_of("man", ahead=1) == MAN(base=GLCAN(ahead=1))
        assert methods.method_of("hpff", window=3) == HPFF(window=3)
        with pytest.raises(PlanError, match="'dgl' has auxiliary networks of its own"):
            methods.method_of("dgl+man")
        with pytest.raises(TypeError, match="'depth'.*has the options"):
            methods.method_of("man+dgl", depth=2)
        with pytest.raises(PlanError, match="choose one of"):
            methods.method_of("man+nothing")

    @pytest.mark.parametrize(("make", "message"), [
        (lambda: HPFF(base="dlg"), "base='dlg'.*'dgl'"), (lambda: MAN(momentum=1.0), "momentum=1.0"),
        (lambda: HPFF(window=1), "window=1"), (lambda: InfoPro(reconstruction=5), "reconstruction=5"),
        (lambda: PredSim(beta=2), "beta=2"), (lambda: AugLocal(depth=0), "depth=0"),
        (lambda: SGR(base="hpff"), "without window"), (lambda: MLAAN(window=1), "window=1")])
    def test_wrong_options(self, make: Any, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            make()

    def test_depth_weighs_the_terms(self) -> None:
        local = compiled("resnet", "infopro")[1]
        weights = [(part.weights["reconstruction"], part.share) for part in (
            local.aux.get_submodule(str(index)) for index in range(local.plan.k - 1))]
        assert weights[0] == (5.0, 0.05) and weights[-1] == pytest.approx((0.2, 0.5))
        assert weights == sorted(weights, reverse=True)

    def test_auglocal_keeps_fewer_blocks_the_deeper_it_stands(self) -> None:
        model = nn.Sequential(*(Block(8, 8) for _ in range(10)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        plan = glcan_fx.plan(model, k="natural", task="classification", example_inputs=torch.empty(2, 8, 16, 16),
                             method=AugLocal(depth=5)).plan
        sizes = [module.aux_parameters for module in plan.modules[:-1]]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[-2]


def test_patches_are_read_one_after_the_other() -> None:
    """With the gradients of the mean of all parts' losses, and the memory of one."""
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(6, 3, 16, 16), torch.randint(5, (6,))
    local = glcan_fx.transform(model, k="natural", task="classification", example_inputs=x,
                               method=HPFF(base=DGL(window=1), patches=2)).train()
    part = local.aux.get_submodule("0")
    assert part.patches == 2
    value = torch.randn(6, 8, 16, 16, requires_grad=True)
    loss = part._loss((value,), (y,))
    found = torch.autograd.grad(loss, [value, *part.network.parameters()], retain_graph=True)
    parts = [p for rows in value.tensor_split(2, 2) for p in rows.tensor_split(2, 3)]
    mean = torch.stack([part.head(part.network(one), y) for one in parts]).mean()
    expected = torch.autograd.grad(mean, [value, *part.network.parameters()])
    torch.testing.assert_close(loss, mean)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_agreement_compares_both_sides_of_a_cut() -> None:
    """The term is the relative squared distance of two gradients that are taken by hand here."""
    from glcan_fx.step.gradients import Agreement

    torch.manual_seed(0)
    agreement = Agreement(0.5)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    out = first(torch.randn(3, 4))
    loss = out.square().mean()
    assert agreement.added(loss, (None, out), "0") is loss
    given = out.detach().requires_grad_()
    other = second(given).tanh().sum()
    whole = agreement.added(other, (given, None), "1")
    a, b = 2 * out.detach() / out.numel(), torch.autograd.grad(other, given, retain_graph=True)[0]
    torch.testing.assert_close(whole - other, 0.5 * (b - a).square().sum() / (a.square().sum() + b.square().sum()))
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(whole - other, [second.weight]))


LOOPED = ["ahead", "window", "man", "hpff on man", "infopro", "sgr"]


@pytest.mark.parametrize("method", LOOPED)
class TestLoops:
    """Whatever a loop does around a step, it does with every method."""

    def test_the_optimizer_in_the_forward_pass_trains_alike(self, method: str) -> None:
        _, local, data = compiled("resnet", method)
        other = copy.deepcopy(local)
        plain = torch.optim.SGD(local.parameters(), 0.05, momentum=0.9)
        inside = other.optimizer_in_forward(torch.optim.SGD, lr=0.05, momentum=0.9)
        for batch in data:
            step(local, plain, batch)
            step(other, inside, batch)
        for name, value in local.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, msg=name)

    def test_accumulation_is_the_mean(self, method: str) -> None:
        _, local, data = compiled("resnet", method)
        local.zero_grad()
        for batch in data[:2]:
            (local(*batch).loss / 2).backward()
        both = {name: p.grad.clone() for name, p in local.named_parameters() if p.grad is not None}
        for buffer, value in zip(local.buffers(), copy.deepcopy(list(compiled("resnet", method)[1].buffers())),
                                 strict=True):
            buffer.data.copy_(value)
        single = []
        for batch in data[:2]:
            local.zero_grad()
            local(*batch).loss.backward()
            single.append({name: p.grad.clone() for name, p in local.named_parameters() if p.grad is not None})
        for name, grad in both.items():
            torch.testing.assert_close(grad, (single[0][name] + single[1][name]) / 2, rtol=1e-3, atol=1e-5)

    def test_autocast(self, method: str) -> None:
        _, local, data = compiled("resnet", method)
        optimizer = torch.optim.SGD(local.parameters(), 0.01)
        for batch in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = local(*batch).loss
            loss.backward()
            optimizer.step()
            assert torch.isfinite(loss)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in local.parameters())

    def test_frozen_parts_get_nothing_and_the_rest_learns(self, method: str) -> None:
        _, local, data = compiled("resnet", method)
        local.original.blocks[1].requires_grad_(False)
        out = local(*data[0])
        out.loss.backward()
        frozen = [p.grad for p in local.original.blocks[1].parameters()]
        assert frozen == [None] * len(frozen)
        assert all(p.grad is not None for p in local.original.blocks[0].parameters())
        assert all(p.grad is not None for p in local.original.blocks[2].parameters())
