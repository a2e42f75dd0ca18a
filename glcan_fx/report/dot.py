"""Draw a plan: the partition graph in Graphviz's DOT language.

From left to right in every row: a local module, its auxiliary network, and the feature cache as it is then. Rows follow
each other from input to head. ``id`` attributes name what a node is: ``module-3``, ``aux-3``, ``cache-3``, and
``module-13-46`` for identical local modules, drawn as one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import graphviz
from torch import fx

from glcan_fx.errors import PlanError, UnsupportedError
from glcan_fx.plans.plan import LocalModule, Plan, Reach
from glcan_fx.report.table import common_prefix, heading, input_sizes, run_again, saved_bytes, span, taps
from glcan_fx.simulate.estimate import Memory
from glcan_fx.structure.structure import Structure
from glcan_fx.structure.trunk import unit_at
from glcan_fx.units import size

PICTURES = (".svg", ".png", ".pdf")
NO_DOT = ("a picture needs Graphviz's program `dot`, which was not found: apt-get install graphviz, or brew install "
          "graphviz. A .html or .dot file needs nothing.")
DEPTHS = ("stages", "modules", "blocks", "operators")
_MANY = 20  # local modules; of more, identical neighbours are drawn as one
# one hue per resolution, readable in grey and by the colour-blind; neighbours of one resolution differ in shade
_HUES = (("#dce9f5", "#c3daee"), ("#fbe6c8", "#f6d6a5"), ("#d7efe6", "#b9e2d3"), ("#f6dfeb", "#edc8dc"),
         ("#f7f3c4", "#ece59a"), ("#e6e2f3", "#d2cbea"), ("#e9e9e9", "#dadada"))
_CUT, _CACHE, _MADE, _BACK = "#c0392b", "#1f6fb2", "#a65e00", "#00695c"
_KINDS = (("cache", "P", _CACHE), ("own", "own", "#2e7d32"), ("synthesised", "S", _MADE))
_FONT = "Helvetica"  # whose widths Graphviz knows, in a browser too


@dataclass(frozen=True)
class _Row:
    """Neighbouring local modules, drawn as one where they are identical."""

    start: int
    modules: tuple[LocalModule, ...]
    kept: tuple[int, int | None]  # bytes for backward, of each: its own, its auxiliary network's

    @property
    def stop(self) -> int:
        return self.start + len(self.modules) - 1

    @property
    def key(self) -> str:
        return str(self.start) if self.stop == self.start else f"{self.start}-{self.stop}"


def plan_dot(
    plan: Plan, memory: Memory | None = None, depth: str | None = None, structure: Structure | None = None
) -> str:
    """The partition graph in DOT. depth: "stages" (identical local modules as one), "modules", "blocks" (what each
    is made of), or "operators", which needs the model; None: stages for many modules, else modules.

    Raises PlanError for another depth, and for operators without the model's ``structure``.
    """
    depth = depth or usual_depth(plan)
    if depth not in DEPTHS:
        raise PlanError(f"depth={depth!r}: choose {', '.join(map(repr, DEPTHS))}")
    graph = graphviz.Digraph(
        "plan",
        graph_attr={"fontname": _FONT, "newrank": "true", "compound": "true", "nodesep": "0.3", "ranksep": "0.34",
                    "labelloc": "t", "label": _title(plan), "color": "#999999", "pad": "0.2", "splines": "true",
                    "outputorder": "edgesfirst", "bgcolor": "white"},
        node_attr={"fontname": _FONT, "shape": "plain", "fontsize": "11"},
        edge_attr={"fontname": _FONT, "fontsize": "9", "color": "#444444", "arrowsize": "0.7"},
    )
    rows = list(_rows(plan, depth, memory))
    colours = _colours([row.modules[-1].stride for row in rows])
    prefix = common_prefix(plan)
    live = _live(plan)
    operators = _operators(plan, structure) if depth == "operators" else {}
    ends = {index: body.end for index, body in operators.items()}
    graph.node("input", f"input  {input_sizes(plan)}", shape="box", style="rounded", id="input")
    ranks: Sequence[int | None] = plan.rank_of or [None] * plan.k
    stride = 1
    for number, row in enumerate(rows):
        module = row.modules[0]
        grown = stride if module.stride > stride else 0
        stride = module.stride or stride
        with graph.subgraph(name=f"cluster_{row.key}") as box:
            box.attr(label="", fillcolor=colours[number], style="rounded,filled", color="#8a8a8a",
                     id=f"module-{row.key}-cluster")
            box.node(f"m{row.start}", _module(row, prefix, grown, depth, ranks[row.start]), id=f"module-{row.key}")
            box.node(f"a{row.start}", _tail() if module.cut is None else _auxiliary(row, prefix, plan.method.parts),
                     id=f"module-{row.key}-head" if module.cut is None else f"aux-{row.key}")
            box.body.extend(operators[row.start].lines if row.start in operators else ())
            with box.subgraph() as same:
                same.attr(rank="same")
                same.node(ends.get(row.start, f"m{row.start}"))
                same.node(f"a{row.start}")
        _connect(graph, row, rows[number - 1] if number else None, ends, plan.reaches, ranks)
        _lane(graph, row, live, prefix, rows[number + 1] if number + 1 < len(rows) else None)
    _writes(graph, plan, rows, live)
    return str(graph.source)


def usual_depth(plan: Plan) -> str:
    """The default: local modules, identical ones together where there are many."""
    return "stages" if plan.k > _MANY else "modules"


def _rows(plan: Plan, depth: str, memory: Memory | None) -> Iterator[_Row]:
    """The local modules one by one, or identical neighbours together."""
    start, modules, kept = 0, plan.modules, saved_bytes(plan, memory)

    def kind(index: int) -> tuple[object, ...]:
        """Modules of one kind are drawn as one."""
        module = modules[index]
        return (module.cut is None, module.shape, module.makes, module.features, module.levels, module.recompute,
                [(block.parameters, block.shape) for block in module.blocks], module.aux_parameters, kept[index],
                plan.rank_of[index: index + 1])

    for index in range(1, plan.k + 1):
        if depth != "stages" or index == plan.k or kind(index) != kind(start):
            yield _Row(start, modules[start:index], kept[start])
            start = index


def colours(plan: Plan) -> list[str]:
    """Of every local module: one hue per resolution."""
    return _colours([module.stride for module in plan.modules])


def _colours(strides: Sequence[int]) -> list[str]:
    found, hue, before = [], -1, -1
    for number, stride in enumerate(strides):
        hue, before = hue + (stride != before), stride
        found.append(_HUES[hue % len(_HUES)][number % 2])
    return found


def _makers(plan: Plan) -> dict[str, int]:
    """The local module that makes each tap; inputs of the network have none."""
    return {tap: index for index, module in enumerate(plan.modules) for tap in module.makes}


def _live(plan: Plan) -> list[list[str]]:
    """The taps in the cache while each local module runs: written by an earlier one, read by it or by a later one."""
    made = _makers(plan)
    read: dict[str, int] = {}
    for index, module in enumerate(plan.modules):
        for tap in taps(module, "cache"):
            read[tap] = index
    return [[tap for tap, last in read.items() if made.get(tap, -1) < index <= last] for index in range(plan.k)]


def picture(dot: str, ending: str) -> bytes:
    """A graph in DOT as a picture, .svg, .png or .pdf. Raises UnsupportedError where it cannot be drawn."""
    try:
        made: bytes = graphviz.Source(dot).pipe(format=ending.removeprefix("."))
    except graphviz.ExecutableNotFound as error:
        raise UnsupportedError(NO_DOT) from error
    except graphviz.CalledProcessError as error:
        raise UnsupportedError(f"`dot` could not draw the plan: {str(error).splitlines()[0]}") from error
    return made


# ---------------------------------------------------------------------------------------------- edges


def _connect(
    graph: graphviz.Digraph, row: _Row, before: _Row | None, ends: Mapping[int, str], reaches: Sequence[Reach],
    ranks: Sequence[int | None]
) -> None:
    """From the module before, or the input, into the row; and on to its auxiliary network."""
    if before is None:
        graph.edge("input", f"m{row.start}", weight="50")
    else:
        here, there = ranks[row.start], ranks[before.start]
        back = [index for index, reach in enumerate(reaches) if reach.first <= before.stop < reach.until]
        colour = _BACK if back else _CUT
        label = _comes_back(back) if back else "  detach" if here == there else f"  detach, sent to rank {here}"
        graph.edge(ends.get(before.start, f"m{before.start}"), f"m{row.start}", weight="50", color=colour,
                   penwidth="1.6", dir="both", arrowtail="inv" if back else "tee", style="dashed", label=label,
                   fontcolor=colour)
    graph.edge(ends.get(row.start, f"m{row.start}"), f"a{row.start}", weight="5")


def _comes_back(losses: Sequence[int]) -> str:
    """Which losses pass a cut."""
    numbers = f"loss {losses[0]}" if len(losses) == 1 else f"losses {losses[0]}–{losses[-1]}"
    return f"  {numbers} back"


def _lane(graph: graphviz.Digraph, row: _Row, live: list[list[str]], prefix: str, after: _Row | None) -> None:
    """The cache beside a row: what it holds, what is read; and on to the next row."""
    here = live[row.start]
    if not here:
        return
    module = row.modules[0]
    read = set(taps(module, "cache"))
    lines = "".join(f'<TR><TD ALIGN="LEFT"><FONT COLOR="{_CACHE if tap in read else "#777777"}" POINT-SIZE="10">'
                    f"{_text(tap.removeprefix(prefix))}</FONT></TD></TR>" for tap in here)
    graph.node(f"c{row.start}", f'<<TABLE BORDER="1" STYLE="dashed" CELLBORDER="0" CELLSPACING="0" COLOR="{_CACHE}" '
               f'BGCOLOR="white">{lines}</TABLE>>', id=f"cache-{row.key}")
    with graph.subgraph() as same:
        same.attr(rank="same")
        same.node(f"a{row.start}")
        same.node(f"c{row.start}")
    if read & set(here):
        graph.edge(f"a{row.start}", f"c{row.start}", dir="back", color=_CACHE, label=" P ", fontcolor=_CACHE)
    else:
        graph.edge(f"a{row.start}", f"c{row.start}", style="invis")
    if after is not None and set(live[after.start]) & set(here):
        graph.edge(f"c{row.start}", f"c{after.start}", color=_CACHE, style="dashed", arrowhead="none", weight="30")


def _writes(graph: graphviz.Digraph, plan: Plan, rows: Sequence[_Row], live: list[list[str]]) -> None:
    """From a module to the next row of the cache."""
    made = _makers(plan)
    if any(tap not in made for tap in live[rows[0].start]):  # inputs of the network
        graph.edge("input", f"c{rows[0].start}", color=_CACHE, constraint="false", penwidth="1.3")
    for before, row in pairwise(rows):
        if any(before.start <= made.get(tap, -1) <= before.stop for tap in live[row.start]):  # from the module's border
            graph.edge(f"a{before.start}", f"c{row.start}", color=_CACHE, penwidth="1.3", ltail=f"cluster_{before.key}")


# ---------------------------------------------------------------------------------------------- labels


def _module(row: _Row, prefix: str, grown: int, depth: str, rank: int | None) -> str:
    """A local module: its blocks, what it outputs, what it costs; in a pipeline, which rank runs it."""
    first, last = row.modules[0], row.modules[-1]
    count = len(row.modules)
    name = span(first, prefix) if count == 1 else f"{span(first, prefix)} … {span(last, prefix)}"
    lines = [f'<FONT POINT-SIZE="12"><B>{_text(row.key.replace("-", "–"))}</B>  {_text(name)}</FONT>']
    if rank is not None:
        lines[0] += f'  <FONT COLOR="{_BACK}"><B>rank {rank}</B></FONT>'
    if grown:
        lines.append(f'<FONT COLOR="#8e24aa"><B>▼ stride {grown} to {last.stride}</B></FONT>')
    where = [f"stride {last.stride}"] * bool(last.stride) + [f"{last.channels} channels"]
    if count > 1:
        where.insert(0, f"{count} identical local modules")
    blocks = len(first.blocks)
    where += [f"{blocks} blocks"] * (blocks > 1 and depth != "blocks")
    lines.append(_text(", ".join(where)))
    each = " each" * (count > 1)
    lines.append(_text(f"{first.parameters:,} parameters{each}"))
    lines.append(_text(f"saves {size(row.kept[0])}{each}{', ' * bool(first.recompute)}{run_again(first)}"))
    text = "<BR/>".join(lines)
    inner = ""
    if depth == "blocks" and blocks > 1:
        inner = "".join(
            f'<TR><TD BGCOLOR="white" ALIGN="LEFT">{_text(b.name.removeprefix(prefix))}<BR/>'
            f'<FONT POINT-SIZE="9" COLOR="#555555">{_text(_where(b.stride, b.shape))}, saves {size(b.saved)}</FONT>'
            "</TD></TR>" for b in first.blocks)
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="2" CELLPADDING="3"><TR><TD>{text}</TD></TR>{inner}</TABLE>>'


def _where(stride: int, shape: Sequence[int]) -> str:
    return ", ".join([f"stride {stride}"] * bool(stride) + ["x".join(map(str, shape))])


def _auxiliary(row: _Row, prefix: str, parts: Sequence[str]) -> str:
    """An auxiliary network: what it synthesises, the local neck and head, the loss. parts: what a method adds."""
    module, count = row.modules[0], len(row.modules)
    read = [(label, colour, tap) for source, label, colour in _KINDS for tap in taps(module, source, prefix)]
    behind = [f"after {name.removeprefix(prefix)}" for name in module.ahead[-1:]]
    added = "".join(f'<TD BGCOLOR="white"><FONT COLOR="{_BACK}">{_text(part)}</FONT></TD>'
                    for part in (*behind, *parts))
    cells = added + "".join(f'<TD BGCOLOR="white"><FONT COLOR="{colour}">{label} {_text(tap)}</FONT></TD>'
                    for label, colour, tap in read)
    number = row.key.replace("-", "–")
    costs = f"{module.aux_parameters:,} parameters"
    costs += "" if row.kept[1] is None else f", saves {size(row.kept[1])}"
    title = f"auxiliary network{'s' * (count > 1)} {number}"
    return (f'<<TABLE BORDER="1" CELLBORDER="1" CELLSPACING="3" CELLPADDING="3" COLOR="#777777" BGCOLOR="#ffffffaa">'
            f'<TR>{cells}<TD BGCOLOR="white">local neck, head</TD><TD BGCOLOR="white">loss {number}</TD></TR>'
            f'<TR><TD BORDER="0" COLSPAN="{len(read) + len(behind) + len(parts) + 2}"><FONT POINT-SIZE="9">'
            f"{_text(title)}: {costs}{' each' * (count > 1)}</FONT></TD></TR></TABLE>>")


def _tail() -> str:
    return ('<<TABLE BORDER="1" CELLBORDER="0" CELLPADDING="5" COLOR="#333333" BGCOLOR="white"><TR><TD>'
            "<B>the model's own neck and head</B><BR/>and its loss</TD></TR></TABLE>>")


def _title(plan: Plan) -> str:
    """The title, and what colours and lines mean."""
    legend = [
        f'<TD><FONT COLOR="{_CUT}"><B>– –|</B> detach: no gradient passes</FONT></TD>',
        f'<TD><FONT COLOR="{_CACHE}"><B>- -</B> feature cache, P: read from it</FONT></TD>',
        f'<TD><FONT COLOR="{_MADE}">S: synthesised</FONT></TD>',
        '<TD><FONT COLOR="#8e24aa">▼ down-sampling</FONT></TD>',
        "<TD>one colour per resolution</TD>",
    ]
    if any(reach.first < reach.until for reach in plan.reaches[:-1]):
        legend.insert(1, f'<TD><FONT COLOR="{_BACK}"><B>– –</B> gradient of a later loss</FONT></TD>')
    return (f'<<TABLE BORDER="0" CELLSPACING="9"><TR><TD COLSPAN="{len(legend)}"><FONT POINT-SIZE="14">'
            f"{_text(heading(plan))}</FONT></TD></TR><TR>{''.join(legend)}</TR></TABLE>>")


def _text(text: str) -> str:
    return escape(text, quote=False)


# ---------------------------------------------------------------------------------------------- operators


@dataclass(frozen=True)
class _Body:
    """A local module's operators as DOT statements, and the name of the one that it ends with."""

    lines: list[str]
    end: str


def _operators(plan: Plan, structure: Structure | None) -> dict[int, _Body]:
    """Of every local module the recorded operations, which decide where it can be cut."""
    if structure is None:
        raise PlanError("depth='operators' needs the model: use glcan_fx.plan(model, plan=plan).")
    ends = [unit.end for name in plan.cuts if (unit := unit_at(structure, name)) is not None]
    owner = {node: index for node, index in structure.assign(ends).items() if node.op != "placeholder"}
    made = {}
    for index in range(plan.k):
        own = [node for node, module in owner.items() if module == index]
        lines = []
        for node in own:
            label = graphviz.quoting.quote(f"{node.name}\\n{node.op.removeprefix('call_')} {_target(node)}")
            lines.append(f'\t\t"o_{node.name}" [label={label} shape=box style="filled,rounded" fillcolor=white '
                         f'fontsize=9 id="module-{index}-op-{node.name}"]\n')
            sources = [source for source in node.all_input_nodes if owner.get(source) == index]
            lines += [f'\t\t"o_{source.name}" -> "o_{node.name}"\n' for source in sources]
            if not sources:
                lines.append(f'\t\t"m{index}" -> "o_{node.name}" [style=dotted arrowhead=none]\n')
        end = ends[index] if index < len(ends) else own[-1] if own else None
        made[index] = _Body(lines, f"o_{end}" if own else f"m{index}")
    return made


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
