"""Show a plan as text: a table with a row per local module, and what a training step takes."""

from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from glcan_fx.devices import OPERATIONS
from glcan_fx.plans.plan import LocalModule, Plan, Run
from glcan_fx.simulate.estimate import Memory
from glcan_fx.simulate.ranks import Rank, bubble
from glcan_fx.units import size

_LITTLE = 0.05  # of backpropagation's memory
_WIDTH = 120  # characters, where there is no terminal
_NAME = 44  # characters of a local module's name; a longer one is folded
_READ = 16  # characters that what a module reads has at least
_DISPENSABLE = ("channels", "blocks", "parameters", "auxiliary")  # columns, on a narrow terminal the first first
_SOURCES = {"cache": ("P", "cyan"), "own": ("own", "green"), "synthesised": ("S", "yellow")}


def plan_text(plan: Plan, memory: Memory | None = None, *, notes: bool = True) -> str:
    """The plan as plain text: its table, what a step takes, its notes. Sizes are those of the example inputs."""
    text = StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None)
    console.width = max(_WIDTH, _least_width(console, _table(plan, memory)))
    print_plan(plan, memory, console)
    for note in plan.notes if notes else ():
        console.print(f"note: {note}", markup=False, emoji=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def print_plan(plan: Plan, memory: Memory | None, console: Console) -> None:
    """Print the plan, without its notes; in a table of fewer columns where the console is narrow, which becomes as wide
    as the narrowest table needs."""
    for count in range(len(_DISPENSABLE) + 1):
        left_out = _DISPENSABLE[:count]
        table = _table(plan, memory, left_out)
        least = _least_width(console, table)
        if least <= console.width:
            break
    console.width = max(console.width, least)
    wider = f" A wider terminal also shows {', '.join(left_out)}." if left_out else ""
    for part in (Text(heading(plan), "bold"), table, Text(legend(plan) + wider, "dim"), *settings(plan),
                 *(memory_text(plan, memory) if memory else ())):
        console.print(part, markup=False, emoji=False)


def heading(plan: Plan) -> str:
    """What was planned, in a line."""
    modules = "1 local module" if plan.k == 1 else f"{plan.k} local modules"
    return (f"{plan.model}, task {plan.task}: {modules} of {len(plan.natural) + 1} possible, planned for "
            f"{input_sizes(plan)}")


def input_sizes(plan: Plan) -> str:
    """Sizes of the compiled part's inputs."""
    values = plan.inputs.values() if isinstance(plan.inputs, dict) else plan.inputs
    return ", ".join("x".join(map(str, value.shape)) if hasattr(value, "shape") else "…" for value in values)


def table_rows(plan: Plan, memory: Memory | None) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, a row per local module, and totals: the sums of the rows. Of bytes: the module's own + its auxiliary
    network's."""
    modules, prefix, kept = plan.modules, common_prefix(plan), saved_bytes(plan, memory)
    unit = "MiB" if max(map(sum, ((own, other or 0) for own, other in kept))) >= 2**20 else "KiB"
    columns = ["", "local module", "stride", "channels", "blocks", "parameters",
               "auxiliary", f"saved, {unit}", "compute", "features"]
    rows = []
    stride = 1
    for index, module in enumerate(modules):
        grown, stride = module.stride > stride, module.stride or stride
        rows.append([
            str(index), span(module, prefix), f"{'▼' * grown}{module.stride or ''}", str(module.channels),
            str(len(module.blocks)), f"{module.parameters:,}", f"{module.aux_parameters:,}",
            _sum(kept[index], unit),
            "" if memory is None else f"{100 * memory.plan.share(index):.1f} %",
            features(module, prefix, short=True)])
    totals = ["", "total", "", "", str(sum(len(m.blocks) for m in modules)), f"{sum(m.parameters for m in modules):,}",
              f"{sum(m.aux_parameters for m in modules):,}",
              _sum((sum(own for own, _ in kept), sum(other or 0 for _, other in kept)), unit),
              "" if memory is None else f"{100 * sum(map(memory.plan.share, range(plan.k))):.1f} %", ""]
    return columns, rows, totals


RIGHT = (0, *range(2, 9))  # columns of numbers


def saved_bytes(plan: Plan, memory: Memory | None) -> list[tuple[int, int | None]]:
    """What each local module and its auxiliary network keep for backward: of the simulated step where there is one,
    otherwise as planned. None: not known."""
    if memory is not None:
        return list(memory.plan.kept)
    return [(m.saved, m.aux_saved or None if m.cut else 0) for m in plan.modules]


def legend(plan: Plan) -> str:
    """What the table's columns mean."""
    prefix = common_prefix(plan)
    paths = f"Module paths begin with {prefix}; saved" if prefix else "Saved"
    return f"{paths} for backward: module + auxiliary network and loss. Features: P from the cache, S synthesised."


def _table(plan: Plan, memory: Memory | None, left_out: Sequence[str] = ()) -> Table:
    columns, rows, totals = table_rows(plan, memory)
    shown = [index for index, name in enumerate(columns) if name not in left_out]
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, collapse_padding=True, pad_edge=False, header_style="bold",
                  footer_style="bold")
    longest = max(len(row[1]) for row in rows)
    for index in shown:
        whole = index in RIGHT or index == 1 and longest <= _NAME
        cells = [*(row[index] for row in rows), totals[index]]
        least = _read_width(plan) if index == len(columns) - 1 else max(map(len, cells)) if whole else None
        table.add_column(Text(columns[index]), Text(totals[index]), justify="right" if index in RIGHT else "left",
                         overflow="fold", no_wrap=whole, max_width=_NAME if index == 1 else None,
                         min_width=least)
    for row in rows:
        texts = [*map(Text, row)]
        texts[2].stylize("bold magenta" if "▼" in row[2] else "")
        for label, colour in _SOURCES.values():
            texts[-1].highlight_regex(rf"\b{label} [^;]*", colour)
        table.add_row(*(texts[index] for index in shown))
    return table


def _least_width(console: Console, table: Table) -> int:
    """The width at which no number is cut off, and no name broken."""
    return Measurement.get(console, console.options.update(width=10_000), table).minimum


def _read_width(plan: Plan) -> int:
    """At which no feature's name is broken, but for long ones."""
    prefix = common_prefix(plan)
    longest = 4 + max((len(f.tap.removeprefix(prefix)) for m in plan.modules for f in m.features), default=0)
    return max(_READ, min(longest, _NAME))


def settings(plan: Plan) -> list[str]:
    """How auxiliary networks are made, and what is done to save memory, in sentences."""
    lines = [plan.method.description(plan.modules[0].levels)] if plan.k > 1 else []
    if plan.k == 1 and any(module.recompute for module in plan.modules):
        lines.append("One local module: the gradients are backpropagation's.")
    savings = ["losses from class ids"] * plan.fused_loss + [f"{plan.slices} slices"] * (plan.slices > 1)
    if savings:
        lines.append(f"Last module: {', '.join(savings)}.")
    again = [f"{run_again(module)} in local module {index}"
             for index, module in enumerate(plan.modules) if module.recompute]
    if again:
        lines.append(f"In backward, {', '.join(again)}.")
    return lines


def run_again(module: LocalModule) -> str:
    """How many of a local module's blocks and parts are recomputed in backward, in words."""
    if not module.recompute:
        return ""
    count, of = len(module.again), len(module.each)
    if of == 1:
        return "its block is recomputed"
    return f"{f'all {of}' if count == of else f'{count} of {of}'} blocks {'is' if count == 1 else 'are'} recomputed"


def run_text(run: Run) -> str:
    """The blocks that are recomputed together; in brackets those inside that are recomputed once more."""
    inside = f" ({'; '.join(map(run_text, run.inside))})" if run.inside else ""
    first, last = run.blocks[0], run.blocks[-1]
    return f"{first if first == last else f'{first} … {last}'}{inside}"


_OPTIMIZERS = {"sgd": " with SGD and momentum", "adam": " with Adam"}


def step_title(plan: Plan) -> str:
    """What the figures of memory are of."""
    optimizer = _OPTIMIZERS.get(plan.optimizer, f" with {plan.optimizer}") if plan.optimizer else ""
    return f"Peak memory of a training step{optimizer}, simulated"


def memory_text(plan: Plan, memory: Memory) -> list[str]:
    """What a training step takes, beside backpropagation."""
    plain = memory.backpropagation
    time = "" if memory.device is OPERATIONS else f" and time on {memory.device.name}, estimated,"
    lines = [f"{step_title(plan)}; compute{time} relative to backpropagation's:"]
    lines += [f"  {name}: {size(step.peak)} ({step.peak / plain.peak:.2f}), {memory.compute(step)}"
              for name, step in memory.named()]
    if memory.checkpointing is None:
        lines.append("  activation checkpointing, every block: unknown, as no block is a single call of a sub-module")
    parts = sorted(memory.plan.parts.items(), key=lambda item: -item[1])
    lines.append(f"This plan's peak is during {memory.plan.when}: "
                 + ", ".join(f"{name} {size(part)}" for name, part in parts if part >= 0.005 * memory.plan.peak))
    return [*lines, *_advice(plan, memory)]


def _advice(plan: Plan, memory: Memory) -> list[str]:
    """What a user would do instead of this plan."""
    again, peak = memory.checkpointing, memory.plan.peak
    saved = 1 - peak / memory.backpropagation.peak
    if plan.k == 1 and not plan.modules[0].recompute:
        return []
    if saved < _LITTLE:
        what = f"saves {saved:.0%} of" if saved > 0 else "takes more than"
        return [f"This plan {what} backpropagation's memory: train the model as it is."]
    if plan.k > 1 and again is not None and again.peak <= peak:
        compute = again.relative_to(memory.backpropagation, memory.device)
        return ["Activation checkpointing needs no more memory than this plan and keeps exact gradients: for an exact "
                f"plan, pass memory_budget= and compute_budget={max(1.01, compute):.2f}."]
    return []


def ranks_text(ranks: Sequence[Rank], micro_batches: int) -> list[str]:
    """What each rank of a pipeline needs, in lines."""
    lines = [f"On {len(ranks)} ranks, with {micro_batches} micro-batches a step (glcan_fx.distributed.pipeline):"]
    for number, rank in enumerate(ranks):
        first, last = rank.modules[0], rank.modules[-1]
        which = f"local module {first}" if first == last else f"local modules {first} to {last}"
        sends = f", sends {size(rank.sent)} a step" if rank.sent else ""
        lines.append(f"  rank {number}: {which}, {size(rank.peak)}, {rank.share:.0%} of the operations{sends}")
    return [*lines, f"  ranks wait for the busiest one {bubble(ranks):.0%} of the time (estimated); apart from "
            "the first fill there is no other bubble"]


def common_prefix(plan: Plan) -> str:
    """The module path, with its final dot, that all blocks begin with."""
    parts = [block.name.split(".")[:-1] for module in plan.modules for block in module.blocks]
    levels = [set(level) for level in zip(*parts, strict=False)]
    same = next((i for i, level in enumerate(levels) if len(level) > 1), len(levels))
    return "".join(f"{part}." for part in (parts[0][:same] if parts else ()))


def span(module: LocalModule, prefix: str = "") -> str:
    """The first and the last block of a local module."""
    names = [block.name.removeprefix(prefix) for block in module.blocks] or [module.name]
    return " … ".join(dict.fromkeys((names[0], names[-1])))


_LISTED = 2  # features of one source in a table


def features(module: LocalModule, prefix: str = "", *, short: bool = False) -> str:
    """What a local loss is computed from; short: of many features of one source the first, the last and how many."""
    parts = [f"{label} {names[0]} … {names[-1]} ({len(names)})" if short and len(names) > _LISTED
             else f"{label} {', '.join(names)}" for source, (label, _) in _SOURCES.items()
             if (names := taps(module, source, prefix))]
    parts += [f"after {name.removeprefix(prefix)}" for name in module.ahead[-1:]]
    return "; ".join(parts + ["neck and head"] * (module.cut is None)) or "its output only"


def taps(module: LocalModule, source: str, prefix: str = "") -> Sequence[str]:
    """The features of one source that a local module reads."""
    return [feature.tap.removeprefix(prefix) for feature in module.features if feature.source == source]


def _sum(parts: tuple[int, int | None], unit: str) -> str:
    own, other = (None if part is None else f"{part / {'MiB': 2**20, 'KiB': 2**10}[unit]:.1f}" for part in parts)
    return f"{own} + {'–' if other is None else other}"

