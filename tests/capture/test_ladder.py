"""Rungs 4 and 5, verification, and types: models that cannot be captured as a whole."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_users_models import IMAGES, LABELS, Block, NormAct, NormsAct
from torch import Tensor, nn

import glcan_fx
from glcan_fx import Options
from glcan_fx.capture.ladder import trace
from glcan_fx.methods import GLCAN


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(8, 8), Block(8, 16, 2), Block(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class AroundTrunk(nn.Module):
    """A branch on values before the trunk; what was made there is read behind it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.body = Body()
        self.neck = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.mean() > 1e9:
            x = -x
        return self.fc(torch.cat([self.neck(self.body(x)).mean((2, 3)), x.mean((2, 3))], 1))


class InLoop(nn.Module):
    """No sub-module holds the layers, and whether a block runs depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.shift = nn.Parameter(torch.zeros(8, 1, 1))
        self.blocks = nn.ModuleList([Block(8, 8), Block(8, 16, 2), Block(16, 16), Block(16, 32, 2), Block(32, 32)])
        self.fc = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.stem(x) + self.shift
        for block in self.blocks:
            if y.mean() > 1e9:
                break
            y = block(y)
        return self.fc(torch.cat([y.mean((2, 3)), x.mean((2, 3))], 1))


def compiled(model: nn.Module, **options: object) -> glcan_fx.LocalModel:
    defaults = {"k": "natural", "criterion": F.cross_entropy, "example_inputs": IMAGES}
    return glcan_fx.transform(model, **(defaults | options)).train()


ladder = pytest.mark.parametrize(("kind", "rung", "k"), [(AroundTrunk, 4, 3), (InLoop, 5, 6)])


@ladder
def test_trains_and_evaluates_as_the_model(kind: type[nn.Module], rung: int, k: int) -> None:
    model = kind()
    plain = copy.deepcopy(model).train()
    local = compiled(model)
    assert (local.plan.report.rung, local.plan.k) == (rung, k)
    assert __file__ in " ".join(local.plan.report.lost)  # the line that did it
    for batch in (4, 3):
        out = local(IMAGES[:batch], LABELS[:batch])
        assert torch.equal(out.output, plain(IMAGES[:batch]))
    out.loss.backward()
    assert all(p.grad is not None for p in local.parameters())
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name  # statistics move once a step
    assert torch.equal(local.eval()(IMAGES), plain.eval()(IMAGES))


@ladder
def test_local_losses_reach_their_module_only(kind: type[nn.Module], rung: int, k: int) -> None:
    model = kind()
    local = compiled(model)
    out = local(IMAGES, LABELS)
    around = {4: ("stem", "neck", "fc"), 5: ("shift", "fc")}[rung]  # run as Python: the first and last may share them
    seen: dict[str, list[int]] = {}
    for index, loss in enumerate(out.losses):
        named = [(n, p) for n, p in model.named_parameters() if not n.startswith(around)]
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
        for (name, _), grad in zip(named, grads, strict=True):
            if grad is not None and grad.abs().max() > 0:
                seen.setdefault(name, []).append(index)
    assert len(seen) == sum(not n.startswith(around) for n, _ in model.named_parameters())
    assert all(len(losses) == 1 for losses in seen.values()), seen


@ladder
def test_one_module_is_backpropagation(kind: type[nn.Module], rung: int, k: int) -> None:
    model = kind()
    plain = copy.deepcopy(model).train()
    F.cross_entropy(plain(IMAGES), LABELS).backward()
    compiled(model, k=1)(IMAGES, LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name


@ladder
def test_saved_copied_and_planned_again(kind: type[nn.Module], rung: int, k: int) -> None:
    local = compiled(kind())
    file = io.BytesIO()
    torch.save(local, file)
    file.seek(0)
    plan = glcan_fx.Plan.from_json(local.plan.to_json())
    assert plan == local.plan
    for other in (torch.load(file, weights_only=False), copy.deepcopy(local),
                  glcan_fx.transform(kind(), criterion=F.cross_entropy, plan=plan)):
        assert other.plan == local.plan and other.code == local.code
        other.train()(IMAGES, LABELS).loss.backward()
        assert all(p.grad is not None for p in other.parameters())


class HooksItself(InLoop):
    """Registers hooks on its own layers at its first call, to collect what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Stage(8, 8), Stage(8, 16, 2), Stage(16, 16), Stage(16, 32, 2), Stage(32, 32)])

    def forward(self, x: Tensor) -> Tensor:
        if "found" not in vars(self):
            for part in (*self.blocks, self.stem):
                part.register_forward_hook(lambda _, args, out: self.found.append(out.mean()))
        self.found = []
        return super().forward(x) + sum(self.found)


class Stage(nn.Module):
    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.a, self.b = Block(*channels), Block(channels[1], channels[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_hooks_that_a_model_registers_itself_run_without_a_graph() -> None:
    model = HooksItself()
    plain = copy.deepcopy(model).train()
    local = compiled(model)
    assert local.plan.report.rung == 5
    for _ in range(2):
        out = local(IMAGES, LABELS)
        assert torch.equal(out.output, plain(IMAGES))
    out.loss.backward()
    assert not [name for name, part in model.named_modules() if part._forward_hooks]


@pytest.mark.parametrize("k", [2, 4, ["blocks.1"], ["stem", "blocks.3"]])
def test_fewer_modules_without_a_graph(k: object) -> None:
    plan = glcan_fx.plan(InLoop(), k=k, criterion=F.cross_entropy, example_inputs=IMAGES)
    assert plan.k == (k if isinstance(k, int) else len(k) + 1)
    assert isinstance(k, int) or list(plan.cuts) == k
    with pytest.raises(glcan_fx.PlanError, match="offers 1 to 6"):
        glcan_fx.plan(InLoop(), k=7, criterion=F.cross_entropy, example_inputs=IMAGES)


@pytest.mark.parametrize("last", [nn.Hardswish, nn.Identity])
def test_a_norm_layer_brings_its_activation(last: type[nn.Module]) -> None:
    model = InLoop()
    model.blocks[1] = NormsAct(NormAct, last(), 8, 16, 2)
    model.blocks[1].norm = NormAct(16, last())
    _, norm, *rest = compiled(model).aux.get_submodule("0.head.network.parts")[1].layers
    assert isinstance(norm, NormAct) and [type(part) for part in rest] == ([nn.ReLU] if last is nn.Identity else [])


class Tokens(nn.Module):
    """Halves a map, and normalises its positions as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 3, 2, 1), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).movedim(1, -1)).movedim(-1, 1)


def test_a_norm_of_tokens_is_one_of_maps_in_an_auxiliary_network() -> None:
    model = InLoop()
    model.blocks[1] = Tokens()
    local = compiled(model)
    local(IMAGES, LABELS).loss.backward()
    assert all(p.grad is not None for p in local.parameters())


def test_activations_die_with_their_module() -> None:
    """On rung 5: what autograd keeps at a module's boundary is nothing but the running module's."""
    local, alive = compiled(InLoop()), []

    def bytes_kept(*_: object) -> None:
        alive.append(sum(t.untyped_storage().nbytes() for t in kept))

    kept: list[Tensor] = []
    for index in range(local.plan.k - 1):
        local.aux.get_submodule(f"{index}.backward").register_forward_hook(bytes_kept)

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()
            kept.append(self.tensor)

        def __del__(self) -> None:
            kept[:] = [t for t in kept if t is not self.tensor]

    pack: Callable[[Tensor], object] = lambda t: t if isinstance(t, nn.Parameter) else Held(t)  # noqa: E731
    import glcan_fx.step.local_model as module

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda held: getattr(held, "tensor", held))
    private, module.private_graph = module.private_graph, lambda: hooks
    try:
        local(IMAGES, LABELS)
    finally:
        module.private_graph = private
    assert alive == [0] * (local.plan.k - 1)


def test_verification_finds_what_is_not_in_the_graph() -> None:
    class Tells(nn.Module):
        """Does something else when it is recorded."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = Body(), nn.Linear(16, 10)
            self.stem = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.stem(x))
            return self.fc(x.mean((2, 3)) if type(x) is Tensor else x.amax((2, 3)))

    with pytest.raises(glcan_fx.TraceError, match="does not compute what the model does.*verify=False"):
        compiled(Tells())
    assert compiled(Tells(), options=Options(verify=False)).plan.k == 4


class Casts(Block):
    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        y = torch.softmax(self.conv(x).to(torch.float32), 1, dtype=torch.float32)
        return self.act(y.to(kind) + x)


def test_types_follow_their_tensors_and_constants_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Casts(8, 8), Casts(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 10)).train()
    for part in model.modules():
        if isinstance(part, Casts):
            del part.norm, part.skip
    local = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, plain = local(IMAGES, LABELS), model(IMAGES)
    assert out.output.dtype == plain.dtype == torch.bfloat16 and torch.equal(out.output, plain)
    other, expected = copy.deepcopy(local).bfloat16(), copy.deepcopy(model).bfloat16()
    assert torch.equal(other(IMAGES.bfloat16(), LABELS).output, expected(IMAGES.bfloat16()))


def test_every_attempt_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "glcan_fx"):
        glcan_fx.plan(InLoop(), k="natural", criterion=F.cross_entropy, example_inputs=IMAGES)
    assert "InLoop cannot be captured: it is cut at calls of sub-modules" in caplog.text
    with caplog.at_level("INFO", "glcan_fx"):
        trace(Body(), [torch.empty(2, 8, 16, 16)])
    assert "Body captured on rung 1" in caplog.text


@pytest.mark.parametrize("width", [None, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("k", [2, "natural"])
def test_what_leaves_a_narrow_trunk_has_all_its_channels(k: object, width: float | None) -> None:
    """Regression: what follows the trunk runs as Python, on the channels that it was made for."""
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(Block(3, 16), Block(16, 16), Block(16, 32, 2), Block(32, 32))
            self.out = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                x = x * 2
            return self.out(self.body(x).mean((2, 3)))

    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    local = glcan_fx.transform(Decides(), k=k, criterion=F.cross_entropy, example_inputs=x, method=GLCAN(width=width))
    assert local.plan.report.rung == 4 and local.plan.memory.plan.peak > 0
    local.train()(x, y).loss.backward()
    assert all(p.grad is not None for p in local.aux.parameters() if p.requires_grad)


class CalledAgain(nn.Module):
    """Decides by values between its blocks, and calls a block and an activation in two local modules each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.last = Block(3, 8, 2), Block(8, 8), Block(8, 8), Block(8, 16, 2)
        self.act, self.out = nn.ReLU(), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.stem, self.first, self.second, self.first, self.last):
            x = self.act(block(x))
            if float(x.detach().sum()) > 1e9:
                x = x * 2
        return self.out(x.mean((2, 3)))


def test_what_is_called_again_by_a_later_module_that_runs_as_python() -> None:
    local = compiled(CalledAgain())
    assert local.plan.report.rung == 5 and local.plan.cuts == ("stem", "first", "second")
    out = local(IMAGES, LABELS)
    assert torch.equal(out.output, local.original(IMAGES)) and len(out.losses) == 4
    out.losses[2].backward()  # of 'second' and the second call of 'first'
    trained = {name.partition(".")[0] for name, p in local.original.named_parameters() if p.grad is not None}
    assert trained == {"first", "second"}
    with pytest.warns(glcan_fx.UnusedGradientsWarning):
        local(IMAGES, LABELS).loss.backward()
    assert all(p.grad is not None for p in local.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", [AroundTrunk, InLoop, CalledAgain])
def test_left_to_itself(kind: type[nn.Module]) -> None:
    """Without k; what runs as Python cannot be simulated, and has one local module per call."""
    local = compiled(kind(), k="fewest")
    assert local.plan.report.rung == 4 or local.plan.k == len(local.plan.natural) + 1
    out = local(IMAGES, LABELS)
    out.loss.backward()
    assert len(out.losses) == local.plan.k and all(p.grad is not None for p in local.parameters() if p.requires_grad)


class Keeps(nn.Module):
    """Moves a buffer and attributes, and draws random numbers, between the blocks of a forward that asks for values."""

    def __init__(self, *, one_trunk: bool) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 10)
        blocks = [Block(8, 8), Block(8, 16, 2), Block(16, 16)]
        self.blocks = nn.Sequential(*blocks) if one_trunk else nn.ModuleList(blocks)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.steps, self.seen = 0, torch.zeros(2)
        self.run = self.noisy

    def noisy(self, part: nn.Module, x: Tensor) -> Tensor:
        return part(x) + (0.1 * torch.randn(1) if self.training else 0)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e9:
            raise ValueError("diverged")
        self.calls += 1
        self.seen += 1
        self.steps += 1
        scale = 1 + 0.1 * torch.rand(1)  # is read at both ends
        x = self.run(self.stem, x * scale)
        for part in [self.blocks] if isinstance(self.blocks, nn.Sequential) else self.blocks:
            x = self.run(part, x)
        self.mean = x.detach().mean()
        return self.fc(x.mean((2, 3))) * scale


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rung", [4, 5])
def test_a_forward_that_runs_again_changes_what_one_run_changes(rung: int, k: int) -> None:
    model = Keeps(one_trunk=rung == 4)
    plain, local = copy.deepcopy(model), compiled(model, k=k)
    assert local.plan.report.rung == rung and local.plan.k == k and "blocks" in repr(local)
    for _ in range(2):
        torch.manual_seed(3)
        out, drawn = local(IMAGES, LABELS), torch.rand(1)
        out.loss.backward()
        torch.manual_seed(3)
        assert torch.equal(out.output, plain(IMAGES)) and torch.equal(drawn, torch.rand(1))
    assert (model.calls, model.steps, model.mean) == (plain.calls, plain.steps, plain.mean) and torch.equal(
        model.seen, plain.seen)


def test_what_a_forward_that_runs_again_would_change_twice_is_refused() -> None:
    class Follows(InLoop):
        def __init__(self) -> None:
            super().__init__()
            self.slow = copy.deepcopy(self.stem).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for slow, fast in zip(self.slow.parameters(), self.stem.parameters(), strict=True):
                    slow.mul_(0.5).add_(fast + 1)
            return super().forward(x + self.slow(x).mean())

    with pytest.raises(glcan_fx.TraceError, match="does not compute what the model does"):
        compiled(Follows())
