"""Write docs/tracing.md: how long capturing takes as networks grow, and how many networks other tracers capture.

    python docs/bench_tracing.py          # about ten minutes on one core
    python docs/bench_tracing.py --quick  # the times only, printed
"""

import argparse
import copy
import gc
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from make_models import build, names, options
from torch import Tensor, fx, nn
from torch.fx.experimental import meta_tracer
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision.models import get_model_builder, get_model_weights
from torchvision.models.feature_extraction import NodePathTracer, _set_default_tracer_kwargs

import glcan_fx
from glcan_fx.capture.ladder import trace
from glcan_fx.measure import medians
from glcan_fx.models import retinanet
from glcan_fx.structure.trunk import analyze

PAGE = Path(__file__).with_name("tracing.md")
DEPTHS = (18, 34, 50, 101, 152)
REPEATS = 3


def times() -> str:
    """Nodes, and seconds, of RetinaNets of five sizes and of the network with the most nodes."""
    lines = ["| network | nodes | trace and analyse, s | per node, ms | k | transform, s |", "|---" * 6 + "|"]
    cases = [(f"RetinaNet-R{depth}", retinanet(depth, num_classes=91), {"task": "detection"}) for depth in DEPTHS]
    cases.append(("maxvit_t", build("maxvit_t"), options("maxvit_t")))
    for name, model, given in cases:
        plan = glcan_fx.plan(model, k="natural", **given)
        inputs = [torch.empty(spec.shape, device="meta") for spec in plan.inputs]
        nodes = len(trace(model, inputs, path=plan.network).graph.nodes)
        gc.collect()
        steps = (lambda m=model, i=inputs, p=plan: analyze(trace(m, i, path=p.network)),
                 lambda m=model, g=given: glcan_fx.transform(m, k="natural", **g))
        captured, whole = medians(steps, REPEATS, warm_up=0)
        lines.append(f"| {name} | {nodes} | {captured:.2f} | {1e3 * captured / nodes:.2f} | {plan.k} | {whole:.1f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ peers


def smallest_of_each_family() -> list[str]:
    """Of the networks that one file of torchvision builds, the one with the fewest parameters."""
    families: dict[str, tuple[int, str]] = {}
    for name in names():
        size = next(iter(get_model_weights(name))).meta["num_params"]
        family = get_model_builder(name).__module__
        families[family] = min(families.get(family, (size, name)), (size, name))
    return sorted(name for _, name in families.values())


def arguments_for(name: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of a training and of an evaluation call, small."""
    given = options(name)
    if given.get("task") == "detection":
        images = [torch.rand(3, 96, 128), torch.rand(3, 128, 96)]
        target = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1]),
                  "masks": torch.ones(1, 96, 128, dtype=torch.uint8), "keypoints": torch.ones(1, 17, 3)}
        other = target | {"masks": torch.ones(1, 128, 96, dtype=torch.uint8)}
        return (images, [target, other]), (images,)
    example = given["example_inputs"]
    values = tuple(torch.rand(t.shape) for t in (example if isinstance(example, tuple) else (example,)))
    return values, values


def torchvisions(model: nn.Module, training: tuple[Any, ...], _: Any) -> Callable[[bool], nn.Module]:
    """What ``create_feature_extractor`` traces with: a graph per mode."""
    graphs = {}
    for mode in (True, False):
        tracer = NodePathTracer(**_set_default_tracer_kwargs(None))
        graphs[mode] = fx.GraphModule(tracer.root if hasattr(tracer, "root") else model,
                                      tracer.trace(model.train(mode)))
    return lambda mode: graphs[mode].train(mode)


def meta(model: nn.Module, training: tuple[Any, ...], _: Any) -> Callable[[bool], nn.Module]:
    arguments = [value.to("meta") if isinstance(value, Tensor) else value for value in training]
    placed = dict(zip(list(inspect.signature(model.forward).parameters), arguments, strict=False))
    traced = meta_tracer.symbolic_trace(model.train(), meta_args=placed)
    return lambda mode: traced.train(mode)


def export(model: nn.Module, training: tuple[Any, ...], evaluation: tuple[Any, ...]) -> Callable[[bool], nn.Module]:
    """One export per mode, since a mode is fixed in it."""
    graphs = {True: torch.export.export(model.train(), training, strict=False).module(),
              False: torch.export.export(model.eval(), evaluation, strict=False).module()}
    return lambda mode: graphs[mode]


def plain_fx(model: nn.Module, *_: Any) -> Callable[[bool], nn.Module]:
    traced = fx.symbolic_trace(model.train())
    return lambda mode: traced.train(mode)


def ours(name: str) -> Callable[..., Callable[[bool], nn.Module]]:
    def capture(model: nn.Module, training: tuple[Any, ...], _: Any) -> Callable[[bool], nn.Module]:
        given = options(name)
        local = glcan_fx.transform(model, k=1, **given)

        class Training(nn.Module):
            def forward(self, *values: Any) -> Any:
                if given.get("task") == "detection":
                    return local.train()(*values)
                local.task.loss = lambda outputs, targets: torch.zeros(())  # the outputs alone are compared
                return local.train()(*values, torch.zeros(2)).output

        return lambda mode: Training() if mode else local.eval()
    return capture


def equal(a: Any, b: Any) -> bool:
    found, expected = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in (a, b))
    return len(found) == len(expected) and all(
        x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(found, expected, strict=True))


def run(module: nn.Module, values: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    copies = tree_map_only(Tensor, Tensor.clone, values)
    with torch.no_grad() if not module.training else torch.enable_grad():
        return module(*copies)


def peers() -> str:
    tracers: dict[str, Any] = {
        "`torch.fx.symbolic_trace`": lambda _: plain_fx,
        "torchvision `create_feature_extractor`": lambda _: torchvisions,
        "`torch.fx.experimental.meta_tracer`": lambda _: meta, "`torch.export(strict=False)`": lambda _: export,
        "glcan_fx": ours,
    }
    networks = smallest_of_each_family()
    counts = {tracer: [0, 0, 0] for tracer in tracers}
    missed: dict[str, list[str]] = {tracer: [] for tracer in tracers}
    for name in networks:
        training, evaluation = arguments_for(name)
        for tracer, make in tracers.items():
            model = captured = None
            gc.collect()  # graphs and modules hold each other
            torch.manual_seed(0)
            model = build(name)
            state = copy.deepcopy(model.state_dict())
            try:
                captured = make(name)(model, training, evaluation)
            except Exception as error:  # noqa: BLE001 - counted
                missed[tracer].append(name)
                print(name, tracer, type(error).__name__, file=sys.stderr, flush=True)
                continue
            counts[tracer][0] += 1
            for column, (mode, values) in enumerate(((True, training), (False, evaluation)), start=1):
                try:
                    model.load_state_dict(state)
                    expected = run(model.train(mode), values)
                    model.load_state_dict(state)
                    counts[tracer][column] += equal(run(captured(mode), values), expected)
                except Exception as error:  # noqa: BLE001 - not equal
                    print(name, tracer, mode, type(error).__name__, str(error)[:100], file=sys.stderr, flush=True)
        print(name, counts, file=sys.stderr, flush=True)
    lines = [f"| tracer | captured, of {len(networks)} | training equal | evaluation equal | not captured |",
             "|---" * 5 + "|"]
    for tracer, (captured, training, evaluation) in counts.items():
        lines.append(f"| {tracer} | {captured} | {training} | {evaluation} | {', '.join(missed[tracer]) or 'none'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the times only, printed")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if quick:
        print(times(), end="")
        return
    versions = f"torch {torch.__version__.split('+')[0]}, torchvision {torchvision.__version__.split('+')[0]}"
    PAGE.write_text(f"""# Capturing networks: time, and other tracers

Written by `python docs/bench_tracing.py` on one CPU core, seed 0, {versions}.

## Time

Medians of {REPEATS} runs. *Trace and analyse* records the call three times (at two batch sizes, and in evaluation
mode) and finds the structure; *transform* is everything, at the natural k.

{times()}
## Other tracers

The smallest network of each family in torchvision's registry, in training mode, detectors whole and with targets.
Equal: the captured module's outputs are the model's, for one batch, in both modes. glcan_fx captures a detector's
backbone and runs the rest as Python.

{peers()}""")


if __name__ == "__main__":
    main()
