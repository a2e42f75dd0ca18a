"""Random models with the behaviour that people's models have, and what must hold for all of them.

    python tests/fuzz.py --count 2000        # a nightly run; prints the seed of every failure

``check(seed)`` makes a model and compiles it; tests/test_fuzz.py runs the first seeds.
"""

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from reference import joined_gradients, restored
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import glcan_fx
from glcan_fx.methods import DGL, GLCAN, HPFF, MAN, MLAAN, SGR, AugLocal, InfoPro, Method
from glcan_fx.planner.stages import Stages
from glcan_fx.plans.plan import Run
from glcan_fx.tasks.captured import Captured

CLASSES = 5
PLAIN = GLCAN(head="full", width=1.0, hidden=0)
METHODS: list[Method] = [
    *[PLAIN] * 8, *[DGL()] * 4, replace(PLAIN, ahead=1), replace(PLAIN, ahead=2), replace(PLAIN, window=2),
    DGL(window=2, ahead=1), MAN(base=DGL()), MAN(base=PLAIN), HPFF(base=DGL()), InfoPro(base=PLAIN), MLAAN(),
    AugLocal(), SGR(base=PLAIN)]


def norm(channels: int, kind: str) -> nn.Module:
    return {"batch": nn.BatchNorm2d, "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
            "group": lambda c: nn.GroupNorm(4, c), "none": lambda c: nn.Identity()}[kind](channels)


# ---------------------------------------------------------------------------------------------- blocks


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int, kind: str, zero: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride, 1), norm(o, kind)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1), norm(o, kind)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(i, o, 1, stride) if stride != 1 or i != o else None
        if zero and hasattr(self.norm2, "weight"):
            nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y = y + (x if self.down is None else self.down(x))
        return self.relu(y)


class Chain(nn.Sequential):
    def __init__(self, i: int, o: int, stride: int, kind: str, zero: bool) -> None:
        super().__init__(nn.Conv2d(i, o, 3, stride, 1), norm(o, kind), nn.ReLU(inplace=True))


class Gated(nn.Module):
    """Squeeze and excitation, a dropout, a rate that a schedule changes."""

    rate = 0.0

    def __init__(self, i: int, o: int, stride: int, kind: str, zero: bool) -> None:
        super().__init__()
        self.body, self.gate = Chain(i, o, stride, kind, zero), nn.Conv2d(o, o, 1)
        self.drop = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.drop(y) * (1 - self.rate)


class Overwriting(nn.Module):
    """Changes its input in place."""

    def __init__(self, i: int, o: int, stride: int, kind: str, zero: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(i, o, 3, stride, 1), norm(o, kind)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x + 0.1, inplace=True)
        y = self.norm(self.conv(x))
        y += 0.01
        return F.leaky_relu(y, 0.1)


class Deciding(nn.Module):
    """Control flow on values and on sizes; numbers are counted."""

    def __init__(self, i: int, o: int, stride: int, kind: str, zero: bool) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(i, o, 3, stride, 1), nn.Conv2d(i, o, 1, stride)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        y = self.conv(x)
        if float(x.mean()) > 1e6:
            return y
        return F.gelu(y + self.other(x))


class Checkpointed(nn.Module):
    def __init__(self, i: int, o: int, stride: int, kind: str, zero: bool) -> None:
        super().__init__()
        self.body = Residual(i, o, stride, "group", zero)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class Parametrised(nn.Module):
    def __init__(self, i: int, o: int, stride: int, kind: str, zero: bool) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(i, o, 3, stride, 1))
        self.norm = norm(o, kind)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x)))


class Pair(nn.Module):
    """Returns more than a map, and leaves a loss behind."""

    extra: Any = None

    def __init__(self, i: int, o: int, stride: int, kind: str, zero: bool) -> None:
        super().__init__()
        self.body = Chain(i, o, stride, kind, zero)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.body(x)
        self.extra = y.square().mean()
        return y, {"mean": y.mean((2, 3)), "size": y.shape[-1]}


def scripted(i: int, o: int, stride: int, kind: str, zero: bool) -> nn.Module:
    return torch.jit.script(Chain(i, o, stride, "group", zero))


def compiled(i: int, o: int, stride: int, kind: str, zero: bool) -> nn.Module:
    return torch.compile(Residual(i, o, stride, kind, zero), backend="eager")


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "residual": Residual, "chain": Chain, "gated": Gated, "overwriting": Overwriting, "deciding": Deciding,
    "checkpointed": Checkpointed, "parametrised": Parametrised, "pair": Pair, "scripted": scripted,
    "compiled": compiled}
_SLOW = ("scripted", "compiled")


# ---------------------------------------------------------------------------------------------- models


class Model(nn.Module):
    """Blocks in a row; what the root's own forward does beside them is drawn at random."""

    temperature = 1.0

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.kind = draw.choice(["batch", "group", "instance", "none"])
        zero = draw.random() < 0.3
        width = draw.choice([8, 12, 16])
        self.scales_input = draw.random() < 0.15
        self.masks = draw.random() < 0.2
        self.asks = draw.random() < 0.2
        self.taps = draw.random() < 0.2
        self.prompted = not self.taps and draw.random() < 0.2
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), norm(width, self.kind), nn.ReLU(inplace=True))
        count = draw.randint(2, 5)
        names = [draw.choice([*BLOCKS]) for _ in range(count)]
        blocks, channels, self.size = [], width, 16
        made, stride = [], 1
        for name in names:
            stride = 2 if self.size > 4 and draw.random() < 0.4 else 1
            out = channels * 2 if stride == 2 and channels < 32 else channels
            blocks.append(BLOCKS[name](channels, out, stride, self.kind, zero))
            before, channels, self.size = channels, out, self.size // stride
            made.append(out)
        self.names = names
        self.nested = draw.random() < 0.4 and "pair" not in names
        self.blocks = nn.Sequential(*blocks) if self.nested else nn.ModuleList(blocks)
        self.again = not self.nested and stride == 1 and before == channels and draw.random() < 0.3  # a layer twice
        self.prompt = nn.Linear(2, channels) if self.prompted else None
        self.maps = not self.taps and draw.random() < 0.3
        self.taps = self.taps and not self.nested  # every block's features, pooled
        inputs = sum(made) if self.taps else channels
        self.head = nn.Conv2d(inputs, CLASSES, 1) if self.maps else nn.Linear(inputs, CLASSES)
        self.dropout = draw.choice([0.0, 0.0, 0.3])
        self.normalises = draw.random() < 0.3  # what it returns are logarithms of probabilities
        self.streams = not (self.taps or self.again or self.masks) and draw.random() < 0.2  # two, of one encoder

    def forward(self, x: Tensor, point: Tensor | None = None) -> Tensor:
        if self.scales_input:
            x *= 0.5
        if self.asks and x.shape[-1] % 4:
            x = F.pad(x, (0, 4 - x.shape[-1] % 4))
        keep = (torch.rand(1, 1, *x.shape[2:]) < 0.7).float() * 1.4 if self.masks else None
        made = self.features(x, keep)
        if self.taps:
            return self.ending(torch.cat([value.mean((2, 3)) for value in made[:len(self.blocks)]], 1))
        x = made[-1] * self.features(x.flip(3), keep)[-1].sigmoid() if self.streams else made[-1]
        if self.prompt is not None and point is not None:
            x = x + self.prompt(point)[:, :, None, None]
        x = x if self.maps else x.mean((2, 3))
        return self.ending(x)

    def features(self, x: Tensor, keep: Tensor | None) -> list[Tensor]:
        """Of every block, of what a mask keeps."""
        x = self.stem(x)
        if keep is not None:
            x = x * keep
            keep = keep.mean((2, 3), keepdim=True)
        if self.nested:
            return [self.blocks(x)]
        made = []
        for block in [*self.blocks, *self.blocks[-1:]] if self.again else self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
            x = x if keep is None else x * keep
            made.append(x)
        return made

    def ending(self, x: Tensor) -> Tensor:
        x = self.head(F.dropout(x, self.dropout, self.training)) / self.temperature
        return x.log_softmax(1) if self.normalises else x


@dataclass
class Case:
    """A model and a way to train it."""

    seed: int
    model: Model
    k: Any
    method: Method
    calls: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> list[str]:
        return ["x", "point"] if self.model.prompted else ["x"]

    def batch(self, seed: int, size: int = 16, images: int = 4) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(images, 3, size, size, generator=generator)]
        if self.model.prompted:
            values.append(torch.randn(images, 2, generator=generator))
        if not self.model.maps:
            return values, torch.randint(CLASSES, (images,), generator=generator)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            shape = make(self.seed).model.eval()(*[v.clone() for v in values]).shape
        return values, torch.randint(CLASSES, (images, *shape[2:]), generator=generator)


def make(seed: int) -> Case:
    """The model of a seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Model(draw)
    case = Case(seed, model, draw.choice(["natural", 2, 3]), draw.choice(METHODS))
    if draw.random() < 0.3:  # a hook that changes what a block outputs, and one that only looks
        index = draw.randrange(len(model.blocks))
        if not isinstance(model.blocks[index], torch.jit.ScriptModule | Pair):
            def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
                case.calls.append("hook")
                return out * 0.9

            model.blocks[index].register_forward_hook(hook)
    if draw.random() < 0.2:
        for p in model.stem.parameters():
            p.requires_grad_(False)
    return case


# ---------------------------------------------------------------------------------------------- what must hold


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that transform() must leave as it is."""
    found: dict[str, Any] = {"state": {k: v.clone() for k, v in model.state_dict().items()},
                             "random": torch.get_rng_state(), "python": random.getstate()}
    for name, part in model.named_modules():
        found[f"{name} training"] = part.training
        found[f"{name} hooks"] = len(part._forward_hooks) + len(part._forward_pre_hooks)
        found[f"{name} attributes"] = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str)}
    for name, p in model.named_parameters():
        found[f"{name} gradient"] = p.grad is None
        found[f"{name} trained"] = p.requires_grad
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key == "state":
            assert value.keys() == after[key].keys()
            wrong = [k for k, v in value.items() if not torch.equal(v, after[key][k])]
            assert not wrong, f"transform changed {wrong}"
        elif isinstance(value, Tensor):
            assert torch.equal(value, after[key]), key
        else:
            assert value == after[key], key


def twin_of(case: Case) -> Model:
    """The same model once more, with the same state and settings; scripted and compiled parts cannot be copied."""
    twin = make(case.seed).model
    twin.load_state_dict(case.model.state_dict())
    twin.temperature = case.model.temperature
    for a, b in zip(twin.blocks, case.model.blocks, strict=True):
        if isinstance(b, Gated):
            a.rate = b.rate
    return twin


REFUSALS = (
    "not possible",  # fewer blocks than k
    "would train all in front of it",  # a window of all local modules
    "Choose other split points",
    "in another order than the model's",  # a pass of an encoder that draws random numbers, or runs twice
    "_local_scalar_dense",  # a block that decides by values, which cannot be copied
)


def check(seed: int) -> str:
    """Compile the model of a seed and check it; returns what was checked. Raises AssertionError, or what failed."""
    torch.set_num_threads(1)
    case = make(seed)
    model = case.model
    example = {name: torch.empty_like(v) for name, v in zip(case.inputs, case.batch(0)[0], strict=True)}
    before = snapshot(model)
    try:
        plan = glcan_fx.plan(model, k=case.k, criterion=F.cross_entropy, method=case.method, example_inputs=example)
        again = runs_again(plan, random.Random(seed)) if seed % 2 else 0
        local = (again or plan).build()
    except glcan_fx.PlanError as error:
        if not any(text in str(error) for text in REFUSALS):
            raise
        return "not possible"
    assert_same(before, snapshot(model))
    assert not case.calls, "transform called a hook of the user's"
    evaluation(case, local)
    output(case, local)
    isolation(case, local)
    reference = gradients(case, local)
    moves(case, local)
    learns(case, local)
    ends(case, local)
    notes = [f"k={local.plan.k}", *["blocks run again"] * bool(again), *["no reference of gradients"] * (not reference)]
    return ", ".join(notes)


def runs_again(plan: Any, choice: random.Random) -> Any:
    """The plan with some blocks that run again, nested, where any may; None where the model runs as Python."""
    if not isinstance(plan.captured, Captured):
        return None
    stages = Stages(plan.captured.structure)

    def runs(start: int, end: int, depth: int) -> tuple[Run, ...]:
        found = []
        while start < end:
            last = choice.randint(start + 1, end)
            if choice.random() < 0.7 and stages.may_run(start, last):
                inside = runs(start, last, depth - 1) if depth else ()
                found.append(Run(tuple(stages.names[start:last]), inside))
            start = last
        return tuple(found)

    modules, start = [], 0
    for module in plan.modules:
        end = start + len(module.each)
        modules.append(replace(module, recompute=runs(start, end, 2)))
        start = end
    return plan.replace(modules=tuple(modules))


def evaluation(case: Case, local: Any) -> None:
    values, targets = case.batch(1)
    torch.manual_seed(5)
    expected = case.model.eval()(*[v.clone() for v in values])
    torch.manual_seed(5)
    assert torch.equal(local.eval()(*[v.clone() for v in values]), expected), "evaluation differs"
    torch.manual_seed(5)
    found = local(*[v.clone() for v in values], targets)
    assert torch.equal(found.output, expected) and torch.allclose(found.loss, F.cross_entropy(expected, targets))


def output(case: Case, local: Any, size: int = 16) -> None:
    """The training output, batch statistics included, is the model's under the same seed."""
    values, targets = case.batch(2, size)
    twin = twin_of(case).train()
    torch.manual_seed(7)
    expected = twin(*[v.clone() for v in values])
    torch.manual_seed(7)
    found = local.train()(*[v.clone() for v in values], targets).output
    torch.testing.assert_close(found, expected, msg=lambda text: f"training output differs: {text}")
    for (name, a), b in zip(local.original.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"buffer {name} differs: {text}")


def ends(case: Case, local: Any) -> None:
    """Every auxiliary network ends as the model does."""
    if not local.plan.reads:  # it runs as Python
        return
    made: list[Tensor] = []
    networks = [part for name, part in local.aux.named_modules() if name.endswith("network") and name.count(".") == 1]

    def note(part: nn.Module, args: Any, out: Any) -> None:
        made.append((out[0] if isinstance(out, tuple) else out).detach())

    handles = [part.register_forward_hook(note) for part in networks]
    values, targets = case.batch(8)
    local.train()(*values, targets)
    for handle in handles:
        handle.remove()
    if case.model.normalises:
        assert all(torch.allclose(x.logsumexp(1), torch.zeros(()), atol=1e-4) for x in made), "an ending is missing"
    patches = [local.aux.get_submodule(str(index)).patches for index in range(local.plan.k - 1)]
    assert len(made) == sum(side * side for side in patches)


def isolation(case: Case, local: Any) -> None:
    """No local loss reaches parameters that the plan gives to another module alone."""
    values, targets = case.batch(3)
    losses = local(*[v.clone() for v in values], targets).losses
    if case.model.again or case.model.streams:
        return  # two local modules train one block
    owners = local.parameters_by_module()
    for index, loss in enumerate(losses):
        trained = {name: [p for p in parameters if p.requires_grad] for name, parameters in owners.items()}
        for position, parameters in enumerate(trained.values()):
            if position != index and parameters and loss.requires_grad:
                grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
                reach = local.plan.reaches[index]
                inside = reach.first <= position <= reach.last
                assert inside or all(g is None or not g.any() for g in grads), f"loss {index} reaches {position}"


def gradients(case: Case, local: Any) -> bool:
    """Gradients are those of the original model, cut by forward hooks, with the same auxiliary networks."""
    if case.method not in (PLAIN, DGL()):
        return joined(case, local)
    cuts = local.plan.cuts
    paths = dict(local.original.named_modules())
    if not local.plan.reads:  # it runs as Python
        return False
    alone = all(names == (cut,) for cut, names in zip(cuts, local.plan.reads, strict=True))
    if case.model.taps or case.model.streams:  # the last module reads more than the last cut; a cut is two values
        return False
    if not alone or any(cut not in paths or isinstance(paths[cut], torch.jit.ScriptModule | Pair) for cut in cuts):
        return False
    values, targets = case.batch(4)
    local.zero_grad()
    state = {k: v.clone() for k, v in local.state_dict().items()}
    torch.manual_seed(11)
    local(*[v.clone() for v in values], targets).loss.backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in local.named_parameters()}
    local.load_state_dict(state)
    local.zero_grad()
    losses: list[Tensor] = []
    handles = [paths[cut].register_forward_hook(_cut(local.aux.get_submodule(str(index)), targets, losses))
               for index, cut in enumerate(cuts)]
    try:
        torch.manual_seed(11)
        losses.append(F.cross_entropy(local.original(*[v.clone() for v in values]), targets))
    finally:
        for handle in handles:
            handle.remove()
    sum(losses).backward()
    for name, p in local.named_parameters():
        expected = p.grad
        if expected is None or found[name] is None:
            assert (expected is None or not expected.any()) and (found[name] is None or not found[name].any()), name
        else:
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5,
                                       msg=lambda text, name=name: f"gradient of {name} differs: {text}")
    local.zero_grad()
    return True


def joined(case: Case, local: Any) -> bool:
    """The same, where a loss trains more than its own module: those of the step's losses without boundaries."""
    if not local.plan.reads or local.plan.method.agreement or any(m.recompute for m in local.plan.modules) or (
            case.model.again or case.model.streams):
        return False
    values, targets = case.batch(4)
    with restored(local):
        torch.manual_seed(11)
        local(*[v.clone() for v in values], targets).loss.backward()
        found = {name: None if p.grad is None else p.grad.clone() for name, p in local.named_parameters()}
    with restored(local):
        torch.manual_seed(11)
        expected = joined_gradients(local, *[v.clone() for v in values], targets)
    for name, gradient in expected.items():
        given = found[name]
        if gradient is None or given is None:
            assert all(g is None or not g.any() for g in (gradient, given)), name
        else:
            torch.testing.assert_close(given, gradient, rtol=1e-3, atol=1e-5,
                                       msg=lambda text, name=name: f"gradient of {name} differs: {text}")
    return True


def _cut(part: Any, targets: Tensor, losses: list[Tensor]) -> Callable[..., Tensor]:
    calls = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(out)
        if len(calls) > 1:  # the cut is behind the first call
            return out
        state = torch.get_rng_state()
        losses.append(part.head(part.network(out), targets))
        torch.set_rng_state(state)
        return out.detach().clone()

    return hook


def moves(case: Case, local: Any) -> None:
    """What a loop changes is seen, or refused with its name."""
    model = case.model
    for block in model.blocks:
        if isinstance(block, Gated):
            block.rate = 0.5
    output(case, local)
    model.temperature = 2.0
    try:
        output(case, local)
    except glcan_fx.ModelChangedError as error:
        if "temperature" not in str(error):
            raise
    model.temperature = 1.0
    if not model.prompted and not model.maps:
        try:
            output(case, local, size=18)
        except glcan_fx.ModelChangedError as error:
            if "sizes" not in str(error):
                raise


def learns(case: Case, local: Any) -> None:
    """Every parameter that backpropagation trains gets a gradient in some of the first steps."""
    twin = twin_of(case).train()
    by_backpropagation: set[str] = set()
    by_local_losses: set[str] = set()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (twin, local)]
    for step in range(3):
        values, targets = case.batch(20 + step)
        for module, found, optimizer in ((twin, by_backpropagation, optimizers[0]),
                                         (local, by_local_losses, optimizers[1])):
            optimizer.zero_grad()
            given = [v.clone() for v in values]
            torch.manual_seed(step)
            loss = module(*given, targets).loss if module is local else F.cross_entropy(module(*given), targets)
            loss.backward()
            found |= {name for name, p in (local.original if module is local else module).named_parameters()
                      if p.grad is not None and p.grad.abs().max() > 0}
            optimizer.step()
    missing = by_backpropagation - by_local_losses
    assert not missing, f"not trained: {sorted(missing)}"


def seeds(count: int, first: int) -> Iterator[int]:
    yield from range(first, first + count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    start, failed, done, without = time.monotonic(), [], 0, 0
    for seed in seeds(options.count, options.seed):
        if time.monotonic() - start > 60 * options.minutes:
            break
        try:
            said = check(seed)
            without += "no reference" in said
        except Exception as error:  # noqa: BLE001 - whatever fails is the finding
            failed.append(seed)
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"seed {seed} ({', '.join(make(seed).model.names)}): {type(error).__name__}: "
                  f"{(str(error).splitlines() or [''])[0][:300]} ({where.filename.rpartition('/')[2]}:{where.lineno})",
                  flush=True)
        done += 1
    print(f"{done} models from seed {options.seed}: {len(failed)} failed {failed}; {without} without a reference of "
          f"gradients; {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
