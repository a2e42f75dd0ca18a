"""Times training steps of two checkouts in turn, and prints the ratios of their medians.

    git worktree add ../before COMMIT
    python docs/bench_steps.py --against ../before

One process per checkout, on one core; a step of the one, a step of the other, and so on, so that both see the same
machine. The same plans (k and auxiliary networks are fixed here), the same seeds, real steps with backward and SGD.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
SIZES: dict[str, tuple[Any, ...]] = {  # the input, k, arguments of the model
    "retinanet-r34": ((2, 3, 256, 320), 17, {"min_size": 256, "max_size": 320}),
    "edsr": ((4, 3, 48, 48), "natural", {}),
    "resnet34": ((16, 3, 96, 96), "natural", {}),
    "yolo-r34": ((2, 3, 256, 256), "natural", {"image_size": 256}),
    "resnet18": ((8, 3, 64, 64), 4, {}),
}


def work() -> None:
    """Serve steps: a line with a model's name on standard input, a line with seconds on standard output."""
    import time

    import torch
    import torch.nn.functional as F
    import torchvision

    import glcan_fx
    from glcan_fx.models import edsr, retinanet, yolo

    torch.set_num_threads(1)
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        size, k, options = SIZES[name]
        torch.manual_seed(0)
        x = torch.randn(size)
        fixed: dict[str, Any] = {"head": "lean", "width": 0.25, "options": glcan_fx.Options(verify=False)}
        if name.startswith(("retinanet", "yolo")):
            build = retinanet if name.startswith("retinanet") else yolo
            model = build(34, num_classes=20, **options)
            local = glcan_fx.transform(model, k=k, task="detection", example_inputs=x, **fixed)
            box = {"boxes": torch.tensor([[20.0, 20, 120, 140], [60, 30, 200, 180]]), "labels": torch.tensor([1, 2])}
            images = list(x.abs().clamp(max=1))
            given = images, [box] * len(images)
        elif name == "edsr":
            model = edsr(scale=2)
            local = glcan_fx.transform(model, k=k, task="super_resolution", example_inputs=x, **fixed)
            given = x, torch.randn(size[0], 3, size[2] * 2, size[3] * 2)
        else:
            model = getattr(torchvision.models, name)(num_classes=10)
            local = glcan_fx.transform(model, k=k, criterion=F.cross_entropy, example_inputs=x, **fixed, hidden=2)
            given = x, torch.arange(size[0]) % 10
        local.train()
        return local, torch.optim.SGD(local.parameters(), 1e-4), given

    for line in sys.stdin:
        name = line.strip()
        if name not in made:
            made[name] = make(name)
        local, optimizer, given = made[name]
        start = time.perf_counter()
        result = local(*given)
        (result.loss if hasattr(result, "loss") else sum(result.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps(time.perf_counter() - start), flush=True)


def start(folder: Path) -> Any:
    return subprocess.Popen([sys.executable, "-W", "ignore", __file__, "--work"], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, env={"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"})


def step(process: Any, name: str) -> float:
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    return float(json.loads(process.stdout.readline()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    now, before = start(HERE), start(options.against.resolve())
    commits = [subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True,
                              text=True, check=True).stdout.strip() for folder in (HERE, options.against)]
    print(f"| step, ms, median of {options.steps}, one core | {commits[1]} | {commits[0]} | ratio |\n|---|---|---|---|")
    for name in SIZES:
        for process in (now, before):
            step(process, name), step(process, name)
        pairs = [(step(now, name), step(before, name)) for _ in range(options.steps)]
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(x / y for x, y in pairs)
        print(f"| {name} {'x'.join(map(str, SIZES[name][0]))} | {1000 * b:.0f} | {1000 * a:.0f} | {ratio:.3f} |",
              flush=True)


if __name__ == "__main__":
    main()
