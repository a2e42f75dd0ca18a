"""Write docs/results.md from docs/results.json, after adding runs of the training programs to it.

    python docs/make_results.py runs/a runs/b   # adds what their record.json says; equal runs are replaced
    python docs/make_results.py                 # writes the page again
"""

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from records import EXACT, Groups, Record, devices, groups, key, order, scores, setting, table  # noqa: E402

RECORDS, PAGE = HERE / "results.json", HERE / "results.md"
_LINES = 10  # more are not told apart in a picture


def tables(records: Sequence[Record]) -> list[str]:
    lines: list[str] = []
    drawn_before: set[str] = set()
    for name in dict.fromkeys(map(setting, records)):
        runs = [record for record in records if setting(record) == name]
        found = groups(runs)
        lines += [f"## {name}", "", *table(runs), *curves(name, scores(runs[0])[0], found, drawn_before),
                  *alignment(found), devices(runs), ""]
    return lines


def said(method: str, k: str, given: str) -> str:
    return method if method in EXACT else f"{method} k={k}" + (f", {given}" if given != "–" else "")


def curves(name: str, score: str, found: Groups, drawn_before: set[str]) -> list[str]:
    """Draws the score over the epochs, the mean of the seeds; ``drawn_before``: names of pictures."""
    drawn = {row: group for row, group in found.items() if all(len(run.get("curve", [])) > 2 for run in group)}
    if len(drawn) > _LINES:  # without ablations
        ablated = ("aux", "rules", "predictors")
        drawn = {row: group for row, group in drawn.items() if not any(name in row[2] for name in ablated)}
    if len(drawn) < 2:
        return []
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    styles = {"bp": "-", "checkpoint": ":", "dgl": "--", "glcan": "-"}
    for row, group in sorted(drawn.items(), key=lambda item: (order(item[0][0]), item[0][1])):
        runs = [dict(map(tuple, run["curve"])) for run in group]
        epochs = sorted(set.intersection(*map(set, runs)))
        means = [statistics.fmean(run[epoch] for run in runs) for epoch in epochs]
        axes.plot(epochs, means, styles.get(row[0], "-."), label=said(*row), color="black" if row[0] == "bp" else None)
    axes.set(xlabel="epoch", ylabel=score)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    short = "results-" + re.sub("[^a-z0-9]+", "-", name.partition(":")[0].lower())
    file = next(file for n in itertools.count(1) if (file := f"{short}-{n}.svg") not in drawn_before)
    drawn_before.add(file)
    rcParams["svg.hashsalt"] = "glcan_fx"
    figure.savefig(HERE / "pictures" / file, metadata={"Date": None})
    return [f"![{score} over the epochs](pictures/{file})", ""]


def alignment(found: Groups) -> list[str]:
    """Cosines between the gradients of local losses and of backpropagation, at the end of training."""
    lines = []
    for row, group in found.items():
        aligned = [run["cosines"] for run in group if "cosines" in run]
        if aligned:
            means = [statistics.fmean(values) for values in zip(*(run.values() for run in aligned), strict=True)]
            lines.append(f"| {said(*row)} | {' '.join(f'{mean:.2f}' for mean in means[:-1])} |")
    head = ["Cosine between the gradients of the local losses and of backpropagation, on one batch at the end, from "
            "the first module on:", "", "| | modules |", "|---|---|"]
    return [*head, *lines, ""] if lines else []


TEXT = """# Results of training

Written by `python docs/make_results.py` from docs/results.json, one record a run of the programs in examples/. Every
method goes through the same loop, with the same data in the same order. In brackets: relative to backpropagation in the
same table, AP and memory as a ratio, accuracy, mIoU and dB as a difference; ±: half of the range over seeds. Runs
shared two CPU cores, so their times mean little: see [performance](performance.md) instead.

What they show so far, on one or two seeds:

- Fewer local modules lose less, and the natural k often takes no less memory than a few: so `k="fewest"` is the
  default. Two modules of a detector keep all of AP50 and almost all of AP in the memory of nine, two of a U-Net nearly
  all of mIoU in that of ten.
- Auxiliary networks that may cost more compute buy accuracy: with `compute_budget=1.3`, super-resolution at k=4 loses
  0.2 dB instead of 0.3, classification at k=4 one point instead of four, and with 1.6 no less. At k=2, where little is
  lost anyway, they bought nothing.
- Checkpointing every block has backpropagation's result. The detector and EDSR need less memory as local modules, at
  less compute; the U-Net as much less; the CIFAR ResNet, whose blocks are many and small, hardly less.
- Classification: GLCAN leads DGL at every k, by several points at the natural one. It owes that to the hidden layers in
  front of the mean: without them it is no better than DGL, and a copied block of the trunk instead of them buys less,
  for twice the compute. Half the width loses where each network predicts from its own output only (`head lean`).
- A loss after the next block (`ahead=1`), and windows of two local modules (`window=2`), close a third and a half of
  the gap at the natural k, for a third and two thirds of backpropagation's compute and twice the memory, on one seed.
  Four local modules with `compute_budget=1.3` lose less, in less of both. Richer networks after the next block bought
  nothing more.
- Reading the model's own last layer (`predictors="model"`) helps at k=4, by a point, and costs nothing; with
  `compute_budget=1.3`, and at the natural k, it changes no more than a seed does.
- Detection: at the natural k almost all of AP is kept, and more at k=2, once training is long enough for all classes to
  be found, which sixteen epochs are not. DGL, with a head of full width at one level, is a little behind, for more
  compute. `head light, aux width 0.25` is what the planner chooses at the natural k.
- Segmentation: a U-Net's early modules need a decoder in their auxiliary networks, and one of a quarter of the width is
  better than the narrowest, on both seeds (`fewest` was run when the planner chose the narrowest; it now takes the
  former). Its own decoder is the last module and decides the memory, so that two local modules save as much as ten, at
  little loss; ten lose a lot.
- Super-resolution: less than half a decibel is lost at every k.
- Of the method's parts, features from the cache instead of synthesised ones (detection, super-resolution), all levels
  instead of one, a predictor of its own for each module, and another weight of a module's own level (detection) made no
  difference beyond that of seeds.
- A higher cosine with backpropagation's gradient does not mean a better result.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs that ended")
    records = {key(record): record for record in (json.loads(RECORDS.read_text()) if RECORDS.exists() else [])}
    for folder in parser.parse_args().runs:
        record = json.loads((folder / "record.json").read_text())
        record = {name: value for name, value in record.items() if name not in ("out", "step", "loss")}
        data = record["data"] if isinstance(record["data"], list) else [record["data"]]
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        first = scores(metrics[0])[0]
        record["curve"] = [[line["epoch"], round(line[first], 4)] for line in metrics]
        record["data"] = [Path(path).name for path in data]
        if "test" in record:
            record["test"] = [Path(path).name for path in record["test"]]
        records[key(record)] = record
    chosen = sorted(records.values(), key=lambda r: (r["task"], r["method"], r["k"], r["seed"]))
    RECORDS.write_text(json.dumps(chosen, indent=1) + "\n")
    PAGE.write_text(TEXT + "\n".join(tables(chosen)))


if __name__ == "__main__":
    main()
