"""Records of runs of the training programs, as tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Groups = dict[tuple[str, str, str], list[Record]]  # runs that differ in their seed only: (method, k, options)
MIB = 2**20
EXACT = ("bp", "checkpoint")
# what is said elsewhere in a row, or does not change a result
_SAID = {"task", "data", "test", "method", "k", "k_asked", "seed", "device", "device_name", "commit", "torch", "out",
         "step", "epoch", "peak_bytes", "compute", "loss", "seconds_a_step", "recipe", "amp"}
_SETTING = ("limit", "epochs", "batch_size", "lr", "depth", "size", "short", "channels", "blocks", "patch", "each",
            "scale", "model", "width", "classes", "stock")
_OPTIONS = ("head", "aux_width", "aux_depth", "aux_hidden", "aux_stride", "aux_lr", "memory_budget", "compute_budget",
            "predictors", "rules", "ahead", "window")
_DEFAULTS = {"aux_lr": 1.0, "aux_depth": 0, "predictors": "own", "ahead": 0}
_METHODS = (*EXACT, "dgl", "glcan")


def key(record: Record) -> str:
    """What a run is a function of, but for the code."""
    known = ("task", "method", "k", "seed", "device_name", "amp", "data", *_OPTIONS, *_SETTING)
    return json.dumps({name: record.get(name, _DEFAULTS.get(name)) for name in sorted(known)})


def setting(record: Record) -> str:
    """Data and training, the same for all methods that are compared."""
    data = record["data"] if isinstance(record["data"], list) else [record["data"]]
    names = " + ".join(Path(folder).name for folder in data)
    said = ", ".join(f"{name.replace('_', ' ')} {record[name]}" for name in _SETTING if record.get(name) is not None
                     and record.get(name) is not False)
    return f"{record['task']}, {names}: {said}"


def scores(record: Record) -> list[str]:
    """Names of what says how good the model is; the first is the one that is drawn."""
    return [name for name, value in record.items()
            if name not in _SAID | set(_SETTING) | set(_OPTIONS) and isinstance(value, float)]


def groups(runs: Sequence[Record]) -> Groups:
    """Runs of one setting, by method: backpropagation and checkpointing first."""
    found: Groups = {}
    for run in runs:
        found.setdefault((run["method"], _modules(run), _options(run)), []).append(run)
    return dict(sorted(found.items(), key=lambda item: order(item[0][0])))


def order(method: str) -> tuple[int, str]:
    return _METHODS.index(method) if method in _METHODS else len(_METHODS), method


def table(runs: Sequence[Record]) -> list[str]:
    """Methods of one setting side by side, beside backpropagation: scores, memory, compute and time of a step."""
    names = scores(runs[0])
    lines = ["| method | k | options | " + " | ".join(names) + " | peak of a step | compute | s a step | seeds |"
             " commit |", "|---" * (len(names) + 8) + "|"]
    found = groups(runs)
    plain = next((group for (method, _, _), group in found.items() if method == "bp"), None)
    for (method, k, given), group in found.items():
        other = plain if method != "bp" else None
        peak = _mean(group, "peak_bytes")
        against = f" ({peak / _mean(other, 'peak_bytes'):.2f})" if other else ""
        cells = [method, k, given, *(_score(name, group, other) for name in names), f"{peak / MIB:.0f} MiB{against}",
                 f"{group[0]['compute']:.2f}", f"{_mean(group, 'seconds_a_step'):.2f}",
                 ", ".join(str(run["seed"]) for run in group), ", ".join(sorted({run["commit"] for run in group}))]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def devices(runs: Sequence[Record]) -> str:
    names, versions = (", ".join(sorted({run[name] for run in runs})) for name in ("device_name", "torch"))
    return f"Device: {names}, torch {versions}."


def _score(name: str, group: Sequence[Record], plain: Sequence[Record] | None) -> str:
    """The mean, half of the range over seeds, and beside backpropagation: AP as a ratio, others as a difference."""
    values, mean = [run[name] for run in group], _mean(group, name)
    spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
    gap = ""
    if plain and not name.startswith("SSIM"):
        other = _mean(plain, name)
        gap = f" ({mean / other:.2f})" if name.startswith("AP") else f" ({mean - other:+.2f})"
    return f"{mean:.4g}{spread}{gap}"


def _mean(runs: Sequence[Record], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def _options(record: Record) -> str:
    """What of the method was asked for."""
    given = [name.replace("_", " ") if record[name] is True else f"{name.replace('_', ' ')} {record[name]}"
             for name in _OPTIONS if record.get(name) is not None and record[name] != _DEFAULTS.get(name)]
    return ", ".join(given) or "–"


def _modules(record: Record) -> str:
    """How many local modules, and what was asked for."""
    asked = str(record.get("k_asked", ""))
    named = record["method"] not in EXACT and asked and not asked.isdecimal()
    return f"{record['k']} ({asked})" if named else str(record["k"])
