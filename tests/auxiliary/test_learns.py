"""Every local module and every auxiliary network learns: what begins at zero or reads nothing of the data is mended."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_registry import LIMIT, build, family, kind_of, names
from test_registry import batch as registry_batch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.ops import StochasticDepth

import glcan_fx
from glcan_fx.initialization import freshen
from glcan_fx.layers import set_width


def batch(index: int, size: int = 32, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return (torch.randn(count, 3, size, size, generator=generator),
            torch.randint(10, (count,), generator=generator))


def compiled(model: nn.Module, k: Any = "natural", size: int = 32, **options: Any) -> glcan_fx.LocalModel:
    torch.manual_seed(0)
    return glcan_fx.transform(model, k=k, criterion=options.pop("criterion", F.cross_entropy),
                              example_inputs=torch.empty(8, 3, size, size), **options).train()


def learners(local: glcan_fx.LocalModel) -> dict[str, list[nn.Parameter]]:
    """The parameters of each local module, and of each auxiliary network."""
    found = {f"local module {name}": list(own) for name, own in local.parameters_by_module().items()}
    for name, parameter in local.named_parameters():
        if name.startswith("aux.") and name.split(".")[1].isdigit() and parameter.requires_grad:
            found.setdefault(f"auxiliary network {name.split('.')[1]}", []).append(parameter)
    return {name: own for name, own in found.items() if any(p.requires_grad for p in own)}


def assert_learns(local: glcan_fx.LocalModel, each: tuple[str, ...] = (), size: int = 32, lr: float = 0.1) -> None:
    """In three steps every group of parameters gets gradients, and each of those parameters of the model."""
    groups = learners(local) | {name: [local.original.get_parameter(name)] for name in each}
    moved = dict.fromkeys(groups, 0.0)
    optimizer = torch.optim.SGD(local.parameters(), lr)
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step, size)
        local(x, y).loss.backward()
        for name, own in groups.items():
            gradients = [p.grad for p in own if p.grad is not None]
            assert all(g.isfinite().all() for g in gradients), f"{name}: a gradient is not finite"
            moved[name] += sum(g.abs().sum().item() for g in gradients)
        optimizer.step()
    assert [name for name, amount in moved.items() if amount == 0] == []


# ------------------------------------------------------------------------------------------ what begins at zero


class RMSNorm(nn.Module):
    """One of a user's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps, self.scale = 1e-6, nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps) * self.scale[:, None, None]


class LayerNorm(nn.LayerNorm):
    """Over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(4, c), "layer": LayerNorm, "own": RMSNorm,
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "plain": lambda c: nn.BatchNorm2d(c, affine=False),
}


class Block(nn.Module):
    """Residual; its last norm begins at ``scale``."""

    def __init__(self, i: int, o: int, norm: Callable[[int], nn.Module], scale: float = 0.0) -> None:
        super().__init__()
        self.a, self.n, self.b, self.last = nn.Conv2d(i, o, 3, o // i, 1), norm(o), nn.Conv2d(o, o, 3, 1, 1), norm(o)
        self.skip = nn.Conv2d(i, o, 1, o // i) if i != o else nn.Identity()
        for name, parameter in self.last.named_parameters():
            if name != "bias":
                nn.init.constant_(parameter, scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.b(F.relu(self.n(self.a(x))))) + self.skip(x))


def residual(norm: Callable[[int], nn.Module] = nn.BatchNorm2d, scale: float = 0.0, *head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Block(8, 8, norm, scale), Block(8, 16, norm, scale),
                         Block(16, 32, norm, scale), Block(32, 32, norm, scale),
                         *(head or (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))))


@pytest.mark.parametrize("method", ["glcan", "dgl"])
@pytest.mark.parametrize("k", ["natural", 3])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_that_begin_at_zero(norm: str, k: Any, method: str) -> None:
    assert_learns(compiled(residual(NORMS[norm]), k, method=method))


@pytest.mark.parametrize("options", [{"hidden": 2}, {"width": 0.5}, {"depth": 1}, {"head": "full"}])
def test_norms_that_nearly_begin_at_zero(options: dict[str, Any]) -> None:
    local = compiled(residual(nn.BatchNorm2d, 1e-5), 3, **options)
    norms = [part for part in local.aux.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms and all((part.weight == 1).all() for part in norms)
    assert_learns(local)


def zeroed(layer: Any, weight: float = 0.0, bias: float | None = None) -> Any:
    nn.init.constant_(layer.weight, weight)
    if layer.bias is not None and bias is not None:
        nn.init.constant_(layer.bias, bias)
    return layer


@pytest.mark.parametrize("k", ["natural", 3])
@pytest.mark.parametrize("method", ["glcan", "dgl"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_last_layers_that_begin_at_a_constant(k: Any, method: str, weight: float) -> None:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(32), zeroed(nn.Linear(32, 16), weight), nn.ReLU(),
            zeroed(nn.Linear(16, 10), weight, -2.0))
    local = compiled(residual(nn.BatchNorm2d, 1.0, *head), k, method=method)
    assert all(part.weight.std() > 0 for part in local.aux.modules() if isinstance(part, nn.Linear))
    assert_learns(local)


def test_a_map_predicted_by_a_convolution_that_begins_at_zero() -> None:
    def criterion(out: Tensor, _: Tensor) -> Tensor:
        return (out - 1).square().mean()

    for head in ("lean", "light"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Block(8, 8, nn.BatchNorm2d), Block(8, 8, nn.BatchNorm2d),
                              nn.Conv2d(8, 32, 1), nn.PixelShuffle(2), zeroed(nn.Conv2d(8, 3, 3, 1, 1), bias=0.5))
        local = compiled(model, "natural", 16, criterion=criterion, head=head)
        out = [part for part in local.aux.modules() if isinstance(part, nn.Conv2d) and part.out_channels in (3, 12)]
        assert out and all(0 < part.weight.std() < 0.1 and (part.bias == 0.5).all() for part in out)  # a prior is kept
        assert_learns(local, size=16)


class Gated(nn.Module):
    """A head behind a scale that begins at zero, and one behind a layer of normalised weights whose length does."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        self.gate, self.shift = nn.Parameter(gate), nn.Parameter(torch.zeros(32))
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(32, 10))
        nn.init.zeros_(self.fc.parametrizations.weight.original0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)) * self.gate.reshape(-1) + self.shift)


@pytest.mark.parametrize("gate", [torch.zeros(1), torch.zeros(32), torch.zeros(32, 1, 1)])
def test_scales_that_begin_at_zero(gate: Tensor) -> None:
    local = compiled(residual(nn.BatchNorm2d, 1.0, Gated(gate)), 3)
    found = dict(local.aux.named_parameters())
    assert all((p == 1).all() for name, p in found.items() if name.endswith(("gate", "original0")))
    assert all((p == 0).all() for name, p in found.items() if name.endswith("shift"))
    assert_learns(local)


def test_copies_begin_as_the_source_does_but_for_what_is_zero() -> None:
    """Small scales of branches, priors, frozen filters and single outputs."""
    net = nn.ModuleDict({
        "scale": nn.ParameterDict({"gamma": torch.full((8, 1, 1), 1e-6), "zero": torch.zeros(8)}),
        "prior": zeroed(nn.Linear(16, 1), bias=-4.6), "fixed": zeroed(nn.Conv2d(4, 4, 3, groups=4), 1 / 9),
        "norm": zeroed(nn.LayerNorm(8), 0.5), "frozen": zeroed(nn.BatchNorm2d(8)),
    })
    net["fixed"].requires_grad_(False)
    net["frozen"].requires_grad_(False)
    with torch.no_grad():
        net["norm"].bias[0] = float("nan")
    new = copy.deepcopy(net)
    freshen(new)
    assert torch.equal(new["scale"].gamma, net["scale"].gamma) and torch.equal(new["scale"].zero, net["scale"].zero)
    assert torch.equal(new["prior"].bias, net["prior"].bias) and 0.1 < new["prior"].weight.std() < 0.5
    assert torch.equal(new["fixed"].weight, net["fixed"].weight) and not new["fixed"].weight.requires_grad
    assert (new["norm"].weight == 0.5).all() and (new["norm"].bias == 0).all()
    assert (new["frozen"].weight == 1).all() and not new["frozen"].weight.requires_grad


def test_narrow_groups_hold_more_than_one_channel() -> None:
    """A channel alone on one place is zero once it is normalised."""
    norm, alone = nn.GroupNorm(32, 64), nn.GroupNorm(64, 64)
    for part in (norm, alone):
        set_width(part, 32)
    assert norm.num_groups == 16 and alone.num_groups == 32
    assert norm(torch.randn(2, 32, 1, 1)).abs().sum() > 0


# ------------------------------------------------------------------------------------------ what is handed on


class Opaque(nn.Module):
    """Cannot be recorded, and changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x.relu_()


class InPlace(nn.Module):
    """Behind its stem and in its tail it overwrites what it reads, as ``kind`` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem = kind, nn.Conv2d(3, 8, 3, 1, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)) for _ in range(3))
        self.relu, self.opaque, self.fc = nn.ReLU(inplace=True), Opaque(), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        if "python" in self.kind and x.abs().max() > 1e9:
            raise ValueError("diverged")
        x = self.overwritten(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        mean = x.mean((2, 3))  # the tail reads the trunk's end twice, so that all of this is copied
        return self.fc(mean + self.overwritten(x).amax((2, 3)))

    def overwritten(self, x: Tensor) -> Tensor:
        if "module" in self.kind:
            return self.relu(x)
        if "function" in self.kind:
            return F.relu(x, inplace=True)
        if "opaque" in self.kind:
            return self.opaque(x)
        if "view" in self.kind:
            x.flatten(2).clamp_(min=0)
            return x
        x *= 2
        return x.relu_()


@pytest.mark.parametrize("k", ["natural", 2])
@pytest.mark.parametrize(
    "kind", ["module", "function", "view", "opaque", "method", "python module", "python function"])
def test_auxiliary_networks_overwrite_nothing_that_is_handed_on(kind: str, k: Any) -> None:
    model = InPlace(kind)
    reference = copy.deepcopy(model).train()
    local = compiled(model, k, 16)
    x, y = batch(0, 16)
    assert torch.equal(local(x, y).output, reference(x))
    assert_learns(local, size=16)


def test_a_criterion_that_overwrites_outputs_changes_nothing_that_is_handed_on() -> None:
    """Where all behind a cut keeps the shape, its auxiliary network returns what it is given."""
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, 1, 1) for _ in range(3)))
    local = compiled(model, size=16, criterion=lambda out, _: (out.mul_(2) - 1).square().mean())
    x, y = batch(0, 16)
    assert local.plan.k == 3 and torch.allclose(local(x, y).output, 2 * local.original(x), atol=1e-6)


# ------------------------------------------------------------------------------------------ places that data reach


class Tokens(nn.Module):
    """A transformer with ``front`` tokens of its own before the patches and ``back`` behind; ``read`` is the head's."""

    def __init__(self, read: Callable[[Tensor], Tensor], front: int = 1, back: int = 0, join: str = "cat") -> None:
        super().__init__()
        self.read, self.join, places = read, join, 16 + front + back
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.front, self.back = nn.Parameter(torch.randn(1, front, 16)), nn.Parameter(torch.randn(1, back, 16))
        self.pos = nn.Parameter(torch.randn(1, places, 16) / 10)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        count, places, _ = x.shape
        front, back = self.front.expand(count, -1, -1), self.back.expand(count, -1, -1)
        if self.join == "cat":
            x = torch.cat([front, x, back], 1)
        elif self.join == "pad":
            x = F.pad(x, (0, 0, front.shape[1], back.shape[1]))
        else:
            out = x.new_zeros(count, front.shape[1] + places + back.shape[1], 16)
            out[:, front.shape[1]: front.shape[1] + places] = x
            out[:, : front.shape[1]] = front
            x = out
        return self.head(self.read(self.norm(self.blocks(x + self.pos))))


READS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {  # what the head reads; tokens in front and behind
    "class token": (lambda x: x[:, 0], 1, 0),
    "at the end": (lambda x: x[:, -1], 0, 1),
    "select": (lambda x: x.select(1, 0), 1, 0),
    "narrow": (lambda x: x.narrow(1, 0, 2).mean(1), 2, 0),
    "distillation": (lambda x: (x[:, 0] + x[:, 1]) / 2, 2, 0),
    "slice": (lambda x: x[:, :2].mean(1), 2, 0),
    "split": (lambda x: x.split([1, x.shape[1] - 1], 1)[0].flatten(1), 1, 0),
    "unbind": (lambda x: x.unbind(1)[0], 1, 0),
    "index": (lambda x: torch.index_select(x, 1, torch.zeros(1, dtype=torch.long)).flatten(1), 1, 0),
    "registers in front": (lambda x: x[:, 4], 5, 0),
    "registers behind": (lambda x: x[:, 0], 1, 4),
    "both ends": (lambda x: x[:, 0] + x[:, -1], 1, 1),
}


@pytest.mark.parametrize("k", ["natural", 2])
@pytest.mark.parametrize("read", READS)
def test_heads_that_read_tokens(read: str, k: Any) -> None:
    local = compiled(Tokens(*READS[read]), k)
    assert_learns(local, ("patch.weight", "patch.bias"))


@pytest.mark.parametrize("join", ["cat", "pad", "assigned"])
def test_tokens_that_join_in_other_ways(join: str) -> None:
    local = compiled(Tokens(lambda x: x[:, 0], 1, 0, join))
    assert "mean" in local.aux.get_submodule("0.network").code
    assert_learns(local, ("patch.weight",))


class SequenceFirst(Tokens):
    """Places, images, channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.front.transpose(0, 1).expand(-1, x.shape[1], -1), x]) + self.pos.transpose(0, 1)
        for block in self.blocks:
            x = block(x.transpose(0, 1)).transpose(0, 1)
        return self.head(self.norm(x)[0])


def test_places_before_images() -> None:
    assert_learns(compiled(SequenceFirst(lambda x: x)), ("patch.weight",))


class Late(nn.Module):
    """The class token joins behind blocks on the patches alone; a user's own module puts it there."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(4))
        self.token = nn.Parameter(torch.zeros(1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks[:2]:
            x = block(x)
        x = torch.cat([x, self.token.repeat(x.shape[0], 1, 1)], 1)
        for block in self.blocks[2:]:
            x = block(x)
        return self.head(x[:, -1])


@pytest.mark.parametrize("k", ["natural", 3])
def test_a_token_that_joins_late(k: Any) -> None:
    local = compiled(Late(), k)
    assert_learns(local, ("patch.weight", "blocks.0.linear1.weight", "blocks.1.linear1.weight"))


def test_only_cuts_that_need_it_read_means() -> None:
    """And a draft is what is built."""
    model = Tokens(lambda x: x[:, 0])
    local = compiled(model)
    codes = [local.aux.get_submodule(f"{index}.network").code for index in range(local.plan.k - 1)]
    assert ["mean" in code for code in codes] == [True] + [False] * (len(codes) - 1) and len(codes) > 1
    pooled = compiled(Tokens(lambda x: x[:, 1:].mean(1)))
    assert all("expand_as" not in pooled.aux.get_submodule(f"{i}.network").code for i in range(pooled.plan.k - 1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), local.original.parameters(), strict=True))


# ------------------------------------------------------------------------------------------ other sizes


class Fixed(nn.Module):
    """Resized to 8 x 8 by ``resize`` in the trunk, behind which a head expects so many places."""

    def __init__(self, resize: Callable[[Tensor], Tensor] | nn.Module, stride: int, inside: bool = False) -> None:
        super().__init__()
        block = lambda i, s=1: nn.Sequential(nn.Conv2d(i, 8, 3, s, 1), nn.BatchNorm2d(8), nn.ReLU())  # noqa: E731
        self.stem, self.down, self.resize = nn.Sequential(block(3), block(8)), nn.MaxPool2d(stride), resize
        self.behind = nn.Sequential(*([block(8), block(8)] if inside else []))
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.behind(self.resize(self.down(self.stem(x)))))


RESIZES: dict[str, Callable[[], Any]] = {
    "average": lambda: nn.AdaptiveAvgPool2d(8),
    "maximum": lambda: nn.AdaptiveMaxPool2d((8, 8)),
    "function": lambda: lambda x: F.adaptive_avg_pool2d(x, 8),
    "interpolated": lambda: lambda x: F.interpolate(x, size=(8, 8)),
    "resized": lambda: nn.Upsample(size=8, mode="bilinear"),
    "cut": lambda: lambda x: x[:, :, :8, :8],
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("resize", RESIZES)
def test_every_size_that_the_model_takes(resize: str, stride: int, inside: bool) -> None:
    """Where a map is resized, to what it has already (stride 4) or to less."""
    takes_every_size(Fixed(RESIZES[resize](), stride, inside))


@pytest.mark.parametrize("resize", RESIZES)
def test_every_size_where_nothing_changes_the_examples(resize: str) -> None:
    takes_every_size(Fixed(RESIZES[resize](), 1, inside=True), 8)


def test_every_size_by_another_method_and_leaner() -> None:
    takes_every_size(Fixed(RESIZES["average"](), 4), method="dgl")
    takes_every_size(Fixed(RESIZES["average"](), 4), width=0.5, head="lean")


def takes_every_size(model: nn.Module, example: int = 32, **options: Any) -> None:
    local = compiled(model, size=example, **options)
    assert local.plan.k > 1
    for factor in (1.5, 1.25, 1):
        assert_learns(local, size=int(factor * example), lr=1e-3)


class Tower(nn.Module):
    """A part of the head with weights that keeps the example's shape only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.fc = nn.Upsample(scale_factor=2), nn.Sequential(nn.Flatten(), nn.Linear(8 * 256, 10))
        self.lateral, self.tower = nn.Conv2d(8, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tower(self.up(self.lateral(x))))


def test_every_size_behind_a_head_that_resizes() -> None:
    body = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, 8, 3, s, 1), nn.ReLU()) for i, s in ((3, 2), (8, 1), (8, 2))))
    takes_every_size(nn.Sequential(body, Tower()))


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda out, y: F.cross_entropy(out, y)], ids=["known", "own"])
def test_a_classifier_that_begins_at_zero(loss: Any) -> None:
    """A new head often does: its own weights learn in the first step, the blocks in front of it from the next on."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(inputs, 8, 3, stride, 1), nn.BatchNorm2d(8), nn.ReLU())
              for inputs, stride in ((3, 2), (8, 1), (8, 2))]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    local = glcan_fx.transform(net, k=3, criterion=loss, example_inputs=x).train()
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        local(x, y).loss.backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters() if p.dim() > 1)
    with pytest.raises(TypeError, match=r"options=glcan_fx.Options\(verify=...\)"):
        glcan_fx.transform(net, k=3, criterion=loss, example_inputs=x, verify=False)


# ------------------------------------------------------------------------------------------ torchvision's networks


@pytest.mark.slow
@pytest.mark.parametrize("k", ["natural", None])
@pytest.mark.parametrize("name", [name for name in names() if kind_of(name) == "classification"])
def test_every_local_module_of_torchvisions_classifiers_learns(name: str, k: Any) -> None:
    """In one step, also where the last norm of each block begins at zero."""
    torch.manual_seed(0)
    zero = family(name) == "resnet"
    model = get_model(name, weights=None, num_classes=5, zero_init_residual=True) if zero else build(name)
    for part in model.modules():
        if isinstance(part, StochasticDepth):
            part.p = 0.0  # both images of a batch may skip a local module
    (x,), y = registry_batch(name)
    chosen = {} if k is None else {"k": k}
    plan = glcan_fx.plan(model, task="classification", example_inputs=x, **chosen)
    if sum(part.parameters + part.aux_parameters for part in plan.modules) > LIMIT:
        pytest.skip("too large")
    local = glcan_fx.transform(model, plan=plan).train()
    local(x, y).loss.backward()
    silent = [group for group, own in learners(local).items()
              if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in own)]
    assert (k is None or local.plan.k > 1) and silent == []
