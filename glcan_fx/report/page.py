"""Write a report: one HTML page that needs nothing but itself, with a plan's graph, memory, table and code."""

import html
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from glcan_fx.errors import UnsupportedError
from glcan_fx.planner.frontier import Point
from glcan_fx.plans.plan import Plan
from glcan_fx.report.dot import colours, picture, plan_dot, usual_depth
from glcan_fx.report.frontier import frontier_data
from glcan_fx.report.table import (
    RIGHT,
    common_prefix,
    features,
    heading,
    legend,
    memory_text,
    run_text,
    saved_bytes,
    settings,
    span,
    step_title,
    table_rows,
)
from glcan_fx.simulate.estimate import Memory
from glcan_fx.step.local_model import LocalModel
from glcan_fx.structure.structure import Structure
from glcan_fx.units import size

_GRAPHS = {"stages": "identical modules as one", "modules": "local modules", "blocks": "blocks"}


def plan_report(
    plan: Plan, memory: Memory | None = None, depth: str | None = None, structure: Structure | None = None,
    local: LocalModel | None = None, frontier: Sequence[Point] = (),
) -> str:
    """The HTML of a plan's report. depth: the graph to begin with, one of ``dot.DEPTHS``.

    memory: the plan's simulated steps, for the curves; structure: the model's, for ``depth="operators"``; local: the
    plan compiled, for the generated code; frontier: for its plot. What is missing is not shown. Raises PlanError for
    operators without structure.
    """
    shown = depth or usual_depth(plan)
    names = sorted({*_GRAPHS, shown}, key=lambda name: (name != shown, name))
    dots = {name: plan_dot(plan, memory, name, structure) for name in names}
    if shown != "stages" and dots["stages"] == dots["modules"]:  # no two are alike
        del dots["stages"]
    columns, rows, totals = table_rows(plan, memory)
    return page({
        "title": plan.model, "subtitle": heading(plan).removeprefix(f"{plan.model}, "),
        "graphs": [{"label": _GRAPHS.get(name, name), "dot": dot} for name, dot in dots.items()],
        "table": {"columns": [{"name": name, "align": "right" if i in RIGHT else "left"}
                              for i, name in enumerate(columns)], "rows": rows, "totals": totals},
        "modules": _modules(plan, memory, local), "memory": _memory(plan, memory),
        "frontier": frontier_data(frontier) if frontier else None,
        "notes": [legend(plan), *settings(plan), *plan.notes], "report": plan.report.lines(plan.model),
    })


def plan_fragment(plan: Plan, memory: Memory | None = None) -> str:
    """A plan as HTML that a notebook shows: the table, what a step takes, and the picture where it can be drawn."""
    columns, rows, totals = table_rows(plan, memory)

    def line(cells: list[str], tag: str) -> str:
        aligned = (f'<{tag} style="text-align:{"right" if i in RIGHT else "left"}">{html.escape(cell)}</{tag}>'
                   for i, cell in enumerate(cells))
        return f"<tr>{''.join(aligned)}</tr>"

    lines = memory_text(plan, memory) if memory else []
    notes = "".join(f"<div>{html.escape(text)}</div>" for text in [legend(plan), *settings(plan), *lines, *plan.notes])
    try:
        drawn = picture(plan_dot(plan, memory), ".svg").decode()
        drawn = f"<details><summary>graph</summary>{drawn[drawn.index('<svg'):]}</details>"
    except UnsupportedError:
        drawn = "<div>plan.save('plan.html') writes the graph.</div>"
    return (f"<b>{html.escape(heading(plan))}</b><table><thead>{line(columns, 'th')}</thead><tbody>"
            f"{''.join(line(row, 'td') for row in rows)}{line(totals, 'th')}</tbody></table>{notes}{drawn}")


def _modules(plan: Plan, memory: Memory | None, local: LocalModel | None) -> list[dict[str, Any]]:
    prefix, kept = common_prefix(plan), saved_bytes(plan, memory)
    code = _code(plan, local) if local else []
    found = []
    for index, (module, colour) in enumerate(zip(plan.modules, colours(plan), strict=True)):
        facts = [
            ("ends after", module.cut or "the network's output"), ("outputs", "x".join(map(str, module.shape))),
            ("stride, channels", f"{module.stride or '–'}, {module.channels}"),
            ("parameters", f"{module.parameters:,}"), ("auxiliary parameters", f"{module.aux_parameters:,}"),
            ("saved for backward", f"{size(kept[index][0])}, auxiliary network and loss {_known(kept[index][1])}"),
        ]
        if memory is not None:
            facts += [("share of compute", f"{100 * memory.plan.share(index):.1f} %"),
                      *((f"peak during {phase.name.partition(' of ')[0]}", size(phase.peak))
                        for phase in memory.plan.timeline if phase.module == index)]
        facts += [("features", features(module, prefix))]
        if module.levels:
            facts.append(("levels, weights", ", ".join(f"{a}: {b:g}" for a, b in zip(module.levels, module.sigma,
                                                                                       strict=True))))
        if module.recompute:
            facts.append(("recomputed in backward", "; ".join(map(run_text, module.recompute))))
        facts += [(f"block {block.name.removeprefix(prefix)}",
                   f"{'x'.join(map(str, block.shape))}, {block.parameters:,} parameters, saves {size(block.saved)}")
                  for block in module.blocks if len(module.blocks) > 1]
        own, auxiliary = code[index] if code else (None, None)
        found.append({"index": index, "name": span(module, prefix), "colour": colour, "facts": [list(f) for f in facts],
                      "code": own, "aux_code": auxiliary, "saved": kept[index][0],
                      "aux_saved": kept[index][1] or 0})
    return found


def _known(count: int | None) -> str:
    return "unknown" if count is None else size(count)


def _code(plan: Plan, local: LocalModel) -> list[tuple[str, str | None]]:
    """The generated code of every local module and of its auxiliary network."""
    parts = re.split(r"^(?= *# local module \d+: )", local.code, flags=re.MULTILINE)[1:]
    networks: list[Any] = [local.aux.get_submodule(f"{index}.network") for index in range(plan.k - 1)]
    return [(_dedented(part), network and _dedented(network.code))
            for part, network in zip(parts, [*networks, None], strict=True)]


def _dedented(code: str) -> str:
    """Without the names that fx sets to None after their last use, which only free memory."""
    return textwrap.dedent(re.sub(r"; +\w+ = .*None$", "", code, flags=re.MULTILINE)).strip()


def _memory(plan: Plan, memory: Memory | None) -> dict[str, Any] | None:
    if memory is None:
        return None
    plain = memory.backpropagation
    return {"text": step_title(plan), "steps": [
        {"name": name, "peak": step.peak, "peak_text": f"{size(step.peak)} ({step.peak / plain.peak:.2f})",
         "compute": memory.compute(step), "when": step.when,
         "parts": [[part, count, size(count)] for part, count in sorted(step.parts.items(), key=lambda x: -x[1])],
         "live": list(step.live), "phases": [[phase.name, phase.start] for phase in step.timeline]}
        for name, step in memory.named()]}


def page(data: Mapping[str, Any]) -> str:
    """The HTML of a report: styles, script, Graphviz as WebAssembly and the data are all in it, and it loads nothing.

    data: title, subtitle, graphs, table, modules, memory, notes and report, as static/report.js describes them. Texts
    are shown as they are; the page only lays them out. Write it as UTF-8.
    """
    parts = {
        "title": _escaped(data["title"]), "subtitle": _escaped(data["subtitle"]), "css": _static("report.css"),
        "viz": _static("viz-global.js"), "js": _static("report.js"), "data": _embedded(data),
    }
    # one pass, so that nothing within a part is taken for a placeholder
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _static("report.html"))


def _escaped(text: str) -> str:
    """In ASCII, so that a text that UTF-8 cannot hold (half a surrogate pair) does not stop the page's writing."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: no text of a model's can end the script, or open a comment in it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _static(name: str) -> str:
    return files(__package__).joinpath("static", name).read_text(encoding="utf-8")
