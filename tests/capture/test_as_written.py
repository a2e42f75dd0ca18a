"""Models as people write them: what eager mode leaves the same stays the same, and hides no block."""

import copy
import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx
from glcan_fx import LocalModel

IMAGES, LABELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)


class Residual(nn.Module):
    def __init__(self, act: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(width, width, 3, padding=1), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.conv(x))


class Net(nn.Module):
    """Four blocks between a stem and a classifier; subclasses say how the blocks are called."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Residual(act or nn.GELU()) for _ in range(4))

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def compiled(model: nn.Module) -> LocalModel:
    return glcan_fx.transform(model, k="natural", criterion=F.cross_entropy, example_inputs=IMAGES).train()


def assert_trains(local: LocalModel) -> None:
    """The training output is the model's, every parameter gets a gradient, evaluation is the model's."""
    out = local(IMAGES, LABELS)
    torch.testing.assert_close(out.output, local.original.train()(IMAGES))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in local.original.parameters())
    assert torch.equal(local.eval()(IMAGES), local.original.eval()(IMAGES))
    local.train()(IMAGES, LABELS).loss.backward()  # after an evaluation, which may have changed the model


def test_one_activation_object_for_all_blocks() -> None:
    local = compiled(Net(nn.GELU()))
    assert local.plan.cuts == compiled(Net()).plan.cuts and local.plan.k == 5
    assert_trains(local)


def test_a_buffer_that_takes_the_type_of_the_input() -> None:
    class Normalized(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.full((1, 3, 1, 1), 0.5)

        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.mean.type_as(x)
            return super().forward(x - self.mean)

    local = compiled(Normalized())
    assert local.plan.k == 5
    assert_trains(local)


def test_a_state_that_really_changes_is_still_refused() -> None:
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.mean + 1
            return super().forward(x)

    with pytest.raises(glcan_fx.TraceError, match="mean"):
        compiled(Counts())


def test_sizes_in_a_cache() -> None:
    @functools.lru_cache
    def halves(size: int) -> tuple[int, int]:
        return size // 2, size - size // 2

    @functools.cache
    def registry() -> dict[str, int]:
        return {}

    class Halves(Net):
        def features(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                left, right = x.split(halves(x.shape[3]), 3)
                x = torch.cat([block(left), right], 3)
            return x

    kept, model = registry(), Halves()
    model.train()(IMAGES)  # keeps numbers that a recording would take for constants
    local = compiled(model)
    assert_trains(local)
    assert registry() is kept
    assert all(type(size) is int for size in halves(16))  # what a recording left would be of a graph that is gone


def test_tensors_in_a_cache() -> None:
    """A cached table of positions is never a fake tensor afterwards, wherever the module that makes it runs."""
    class Positions(nn.Module):
        @functools.lru_cache  # noqa: B019
        def table(self, height: int, width: int) -> Tensor:
            return torch.arange(height * width).view(height, width) / (height * width)

        def forward(self, height: int, width: int) -> Tensor:
            return self.table(int(height), int(width))

    class Placed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions()

        def features(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x + self.positions(x.shape[2], x.shape[3]))
                if not torch.isfinite(x).all():
                    x = x.clamp(-1e3, 1e3)
            return x

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Placed()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    for kind in (Placed, Whole):
        local = compiled(kind())
        assert_trains(local)
        str(glcan_fx.plan(local.original, criterion=F.cross_entropy, example_inputs=IMAGES))
        assert_trains(local.train())


def test_no_cut_inside_of_a_module_with_a_hook() -> None:
    class Stages(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(*(Residual(nn.GELU()) for _ in range(3))) for _ in range(3))

    model, seen = Stages(), []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    local = compiled(model)
    cuts = local.plan.cuts
    assert "blocks.0.1" in cuts and not {"blocks.1.0", "blocks.1.1"} & {*cuts}
    assert any("'blocks.1', which goes on behind it, has a hook" in note for note in local.plan.notes)
    seen.clear()
    local(IMAGES, LABELS)
    assert len(seen) == 1
    with pytest.raises(glcan_fx.PlanError, match="'blocks.1' of class Sequential has a hook"):
        glcan_fx.transform(model, k=["blocks.1.0"], criterion=F.cross_entropy, example_inputs=IMAGES)


@pytest.mark.parametrize("called", [False, True])
def test_hooks_that_a_model_installs_once(called: bool) -> None:
    class Collects(Net):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "seen"):
                self.seen: list[Tensor] = []
                for block in self.blocks:
                    block.register_forward_hook(lambda module, args, out: self.seen.append(out))
            self.seen.clear()
            self.features(x)
            return self.fc(torch.stack(self.seen).mean(0).mean((2, 3)))

    model = Collects()
    if called:
        model(IMAGES)
    local = compiled(model)
    assert local.plan.k > 1 and local.plan.memory.plan.peak > 0
    assert_trains(local)


def test_a_transformer_block_between_maps() -> None:
    class Mixed(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.pre = nn.Conv2d(inputs, 16, 3, 2, 1)
            self.attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pre(x)
            tokens = self.attention(x.flatten(2).transpose(1, 2))
            return tokens.transpose(1, 2).reshape(x.shape)

    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.fc = nn.Sequential(Mixed(3), Mixed(16)), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.blocks(x).mean((2, 3)))

    local = compiled(Hybrid())
    assert {"blocks.0"} <= {*local.plan.cuts}
    assert_trains(local)


def test_dense_predictions_at_odd_sizes() -> None:
    """Auxiliary networks predict maps of the image's size, which no factor gives where it is odd."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
            self.head = nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.stem(x).relu()).relu()
            return F.interpolate(self.head(y), size=x.shape[2:])

    local = glcan_fx.transform(Dense(), k="natural", criterion=F.cross_entropy, example_inputs=IMAGES,
                               head="lean").train()
    assert local.plan.k > 1
    local(torch.randn(4, 3, 17, 19), torch.zeros(4, 17, 19, dtype=torch.long)).loss.backward()


class LastState(nn.Module):
    """Returns its last value twice, the second time among all that it passed through, of which some are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, object]:
        states = [x]
        for block in self.blocks:
            if not self.training or torch.rand(()).item() > 0.5:
                states.append(block(states[-1]))
        return {"last": states[-1], "all": tuple(states)}


def test_what_is_returned_twice_goes_by_its_first_name() -> None:
    class Stochastic(Net):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.end = LastState(), Residual(nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.end(self.encoder(self.stem(x))["last"]).mean((2, 3)))

    local = glcan_fx.transform(Stochastic(), k=["encoder"], criterion=F.cross_entropy, example_inputs=IMAGES).train()
    assert "'last'" in local.code
    for _ in range(5):  # however many blocks run
        local(IMAGES, LABELS).loss.backward()


def test_a_tensor_that_wants_no_gradient_anyway() -> None:
    class Weighted(Net):
        def forward(self, x: Tensor) -> Tensor:
            weight = nn.Buffer(torch.ones(5)).requires_grad_(False)
            return super().forward(x.requires_grad_(False)) * weight

    local = compiled(Weighted())
    assert local.plan.k == 5 and local.plan.report.rung == 1
    assert_trains(local)


def test_statistics_that_the_model_moves_without_gradients() -> None:
    class Centred(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(1, 8, 1, 1))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            x = self.features(x)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean((0, 2, 3), keepdim=True), alpha=0.1)
                self.calls += 1
            return self.fc((x - self.mean).mean((2, 3)))

    model = Centred()
    plain, local = copy.deepcopy(model), compiled(model)
    assert local.plan.k == 5 and local.plan.report.rung == 1
    for _ in range(2):
        out = local(IMAGES, LABELS)
        torch.testing.assert_close(out.output, plain(IMAGES))
        out.loss.backward()
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
    assert not model.mean.requires_grad and all(p.grad is not None for p in model.parameters())


class Leaves(Net):
    """Leaves a term of the loss, and a feature map, on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.term = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = self.early = self.blocks[1](self.blocks[0](self.stem(x)))
        x = self.blocks[3](self.blocks[2](x)).mean((2, 3))
        self.term = x.square().mean()
        return self.fc(x)


def test_what_the_model_leaves_on_itself() -> None:
    model = Leaves()
    plain, local = copy.deepcopy(model), glcan_fx.transform(
        model, k=3, criterion=lambda out, y: F.cross_entropy(out, y) + model.term, example_inputs=IMAGES).train()
    last = local(IMAGES, LABELS).losses[-1]
    torch.testing.assert_close(last, F.cross_entropy(plain(IMAGES), LABELS) + plain.term)
    torch.testing.assert_close((model.term, model.early), (plain.term, plain.early))
    with pytest.raises(glcan_fx.PlanError, match="slices=2: it leaves a value on 'term'"):
        glcan_fx.transform(model, k=3, criterion=F.cross_entropy, example_inputs=IMAGES,
                           options=glcan_fx.Options(slices=2))


def test_outputs_by_kind_and_scale() -> None:
    class Scales(Net):
        def forward(self, x: Tensor) -> dict[tuple[str, int], Tensor]:
            x = self.features(x)
            return {("logits", scale): self.fc(F.avg_pool2d(x, 2 ** scale).amax((2, 3))) for scale in (0, 1)}

    local = glcan_fx.transform(Scales(), k=3, example_inputs=IMAGES,
                               criterion=lambda out, y: sum(F.cross_entropy(part, y) for part in out.values())).train()
    out = local(IMAGES, LABELS)
    out.loss.backward()
    assert local.plan.report.rung == 1
    torch.testing.assert_close(out.output, local.original(IMAGES))


def test_a_power_behind_the_trunk() -> None:
    class Square(Net):
        def forward(self, x: Tensor) -> Tensor:
            return (self.fc(self.features(x).mean((2, 3))) ** 2 + 1) ** 0.5

    local = compiled(Square())
    assert local.plan.k == 5
    assert_trains(local)


def test_caches_are_found_wherever_code_reaches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind functions that are imported inside of functions, helpers' classes, attributes, and decorators."""
    (tmp_path / "far_away.py").write_text("import functools\n@functools.lru_cache\ndef far(size): return size + 1\n")
    (tmp_path / "net.py").write_text(
        "import functools, torch\n"
        "class Helper:\n"
        "    @staticmethod\n    @functools.cache\n    def near(size): return size + 2\n"
        "helper = Helper()\n"
        "def logged(function):\n"
        "    @functools.wraps(function)\n    def wrapper(*args): return function(*args)\n    return wrapper\n"
        "@logged\n@functools.lru_cache\ndef wrapped(size): return size + 3\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.fc = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Linear(8, 5)\n"
        "        self.own = functools.lru_cache(lambda size: size + 4)\n"
        "    def forward(self, x):\n"
        "        import far_away\n"
        "        size = x.shape[-1]\n"
        "        scale = far_away.far(size) + helper.near(size) + wrapped(size) + self.own(size)\n"
        "        return self.fc(torch.relu(self.conv(x)).mean((2, 3))) * scale\n")
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("net")
    model = net.Net()
    x = torch.randn(2, 3, 16, 16)
    model(x)
    local = glcan_fx.transform(model, k="natural", task="classification", example_inputs=x)
    far = sys.modules["far_away"].far
    assert all(f.cache_info().currsize == 0 for f in (far, net.Helper.near, net.wrapped.__wrapped__, model.own))
    for size in (16, 24):
        images = torch.randn(2, 3, size, size)
        torch.testing.assert_close(local.train()(images, torch.tensor([0, 1])).output, model.train()(images).detach())
