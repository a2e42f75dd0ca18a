"""Show a plan: as a table for the terminal, and as a graph in Graphviz's DOT language."""

from io import StringIO
from typing import TYPE_CHECKING

import graphviz
from rich import box
from rich.console import Console
from rich.table import Table

from .errors import GlcanFxError

if TYPE_CHECKING:
    from .plan import LocalModule, Plan

_COLOURS = ("#dbe9f6", "#e3f2dd", "#fdebd3", "#f3e1f0", "#e0f0ef", "#f7e3e0")


def plan_table(plan: "Plan", *, width: int = 120) -> str:
    """The plan as text: one row per local module, totals, notes. Sizes are those of the example inputs."""
    modules, prefix = plan.modules, _common_prefix([unit for module in plan.modules for unit in module.units])
    title = (f"{plan.model}, task {plan.task}: {plan.k} local modules of {len(plan.natural) + 1} possible, planned for "
             f"{_inputs(plan)}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1))
    table.add_column("", justify="right")
    table.add_column(f"local module {prefix and f'({prefix}…)'}", "total")
    table.add_column("stride", justify="right")
    table.add_column("channels", justify="right")
    table.add_column("parameters", _count(sum(m.parameters for m in modules)), justify="right")
    table.add_column("auxiliary", _count(sum(m.aux_parameters for m in modules)), justify="right")
    table.add_column("kept for backward", f"max {size(max(m.saved + m.aux_saved for m in modules))}", justify="right")
    table.add_column("features: P cached, own, S synthesised")
    for index, module in enumerate(modules):
        table.add_row(
            str(index), " … ".join(dict.fromkeys(u.removeprefix(prefix) for u in (module.units[0], module.units[-1]))),
            str(module.stride or ""), str(module.channels), _count(module.parameters), _count(module.aux_parameters),
            f"{size(module.saved)} + {size(module.aux_saved)}", _features(module, prefix),
        )
    text = StringIO()
    console = Console(file=text, width=width, color_system=None)
    console.print(table)
    options = plan.options
    if plan.k > 1:
        kept = f", {options.depth} blocks" if options.depth else ""
        levels = f", levels of stride {options.stride} and more" if options.stride > 1 and modules[0].levels else ""
        shared = ", shared predictors" if options.share_predictors else ""
        console.print(f"Auxiliary networks: head {options.head}, width {options.width:g}{kept}{levels}{shared}.")
    savings = ["losses from class ids"] * options.fused + [f"{options.slices} slices"] * (options.slices > 1)
    if savings:
        console.print(f"Last module: {', '.join(savings)}.")
    again = [str(index) for index, module in enumerate(modules) if module.recompute]
    if again:
        console.print(f"Blocks run again in backward in modules {', '.join(again)}.")
    console.print(*_memory(plan), sep="\n")
    for note in plan.notes:
        console.print(f"note: {note}")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _memory(plan: "Plan") -> list[str]:
    """What a training step takes, beside backpropagation."""
    try:
        memory = plan.memory
    except GlcanFxError as error:
        return [f"note: {error}"]
    plain = memory.backpropagation
    rows = [("backpropagation", plain), ("with every block recomputed", memory.checkpointing),
            ("this plan", memory.plan)]
    lines = ["Peak memory of a training step with SGD and momentum, simulated; compute relative to backpropagation's:"]
    lines += [f"  {name}: {size(e.peak)} ({e.peak / plain.peak:.2f}), compute {e.flops / max(plain.flops, 1):.2f}"
              for name, e in rows if e is not None]
    parts = sorted(memory.plan.parts.items(), key=lambda item: -item[1])
    lines.append(f"This plan's peak is during {memory.plan.when}: "
                 + ", ".join(f"{name} {size(part)}" for name, part in parts if part >= 0.005 * memory.plan.peak))
    return lines


def _common_prefix(names: list[str]) -> str:
    """The module path, with its final dot, that all names begin with."""
    parts = [name.split(".")[:-1] for name in names]
    common = [level[0] for level in zip(*parts, strict=False) if len(set(level)) == 1]
    same = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), len(common))
    return "".join(f"{part}." for part in common[:same])


def plan_dot(plan: "Plan") -> str:
    """The partition graph in DOT: the trunk as a column, its auxiliary networks beside it, the feature cache dashed."""
    font = {"fontname": "Helvetica"}
    graph = graphviz.Digraph(
        "plan",
        graph_attr={**font, "nodesep": "0.35", "ranksep": "0.3", "labelloc": "t",
                    "label": f"{plan.model}: {plan.k} local modules"},
        node_attr={**font, "shape": "box", "style": "filled,rounded", "fontsize": "11", "color": "#666666"},
        edge_attr={**font, "fontsize": "9", "color": "#444444"},
    )
    graph.node("input", "input", fillcolor="white")
    last = plan.k - 1
    producers = _producers(plan)
    prefix = _common_prefix([unit for module in plan.modules for unit in module.units])
    for index, module in enumerate(plan.modules):
        lines = [f"{index}  {module.name}", f"stride {module.stride}, {module.channels} channels"
                 if module.stride else f"{module.channels} channels", f"keeps {size(module.saved)}"]
        graph.node(f"m{index}", "\n".join(lines), fillcolor=_COLOURS[index % len(_COLOURS)])
        before = "input" if index == 0 else f"m{index - 1}"
        graph.edge(before, f"m{index}", **({} if index == 0 else {"label": " detach", "style": "bold"}), weight="20")
        if index == last:
            graph.node("tail", "neck, head, loss", fillcolor=_COLOURS[index % len(_COLOURS)])
            graph.edge(f"m{index}", "tail")
            continue
        synthesised = [f.tap.removeprefix(prefix) for f in module.features if f.source == "synthesised"]
        text = [f"auxiliary {index}", f"{_count(module.aux_parameters)} parameters, keeps {size(module.aux_saved)}"]
        if synthesised:
            text.insert(1, "S: " + ", ".join(synthesised))
        with graph.subgraph() as row:
            row.attr(rank="same")
            row.node(f"m{index}")
            row.node(f"a{index}", "\n".join(text), fillcolor=_COLOURS[index % len(_COLOURS)], shape="note",
                     style="filled")
        graph.edge(f"m{index}", f"a{index}", label=" local loss")
        for feature in module.features:
            if feature.source == "cache":
                source = producers.get(feature.tap)
                graph.edge("input" if source is None else f"m{source}", f"a{index}", style="dashed",
                           color="#2a6fb0", constraint="false", label=f" P {feature.tap.removeprefix(prefix)}",
                           fontcolor="#2a6fb0")
    return str(graph.source)


def _producers(plan: "Plan") -> dict[str, int]:
    """The local module that makes each tap: the last before the first that reads it from the cache."""
    first: dict[str, int] = {}
    for index, module in enumerate(plan.modules):
        for feature in module.features:
            if feature.source == "own":
                first[feature.tap] = index
            elif feature.source == "cache":
                first.setdefault(feature.tap, index - 1)
    return {tap: index for tap, index in first.items() if index >= 0}


def _inputs(plan: "Plan") -> str:
    values = plan.inputs.values() if isinstance(plan.inputs, dict) else plan.inputs
    return ", ".join("x".join(map(str, value.shape)) if hasattr(value, "shape") else "…" for value in values)


def _features(module: "LocalModule", prefix: str) -> str:
    if module.cut is None:
        return "neck and head"
    parts = []
    for source, label in (("cache", "P"), ("own", "own"), ("synthesised", "S")):
        names = [feature.tap for feature in module.features if feature.source == source]
        if names:
            parts.append(f"{label} {', '.join(name.removeprefix(prefix) for name in names)}")
    return "; ".join(parts)


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number / 1e3:.1f} k" if number >= 1e3 else str(number)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
