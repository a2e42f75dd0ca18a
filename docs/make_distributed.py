"""Measure a pipeline of two ranks, and gradients that are averaged while the next module computes.

    python docs/make_distributed.py [pipeline | link | paper ...]

and write docs/distributed.md anew, between its marks.

Every process has one thread. What a rank does not spend in its local modules, once every rank has work, is the bubble.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel

import glcan_fx
from glcan_fx.distributed import channel
from glcan_fx.measure import medians
from glcan_fx.models import edsr
from glcan_fx.models.load import load
from glcan_fx.peak_memory import PeakMemory
from glcan_fx.presets import PRESETS
from glcan_fx.simulate.ranks import bubble

MICRO, STEPS = 8, 6
MODELS: dict[str, Any] = {
    "ResNet-18, 64 px": (lambda: torchvision.models.resnet18(num_classes=10), "classification", (64, 3, 64, 64)),
    "EDSR x2, 48 px": (lambda: edsr(scale=2), "super_resolution", (16, 3, 48, 48)),
}


class AtOnce(nullcontext[Any]):
    """Runs what is submitted, in this thread."""

    def __init__(self, _: int) -> None:
        super().__init__(self)

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function())
        return future


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    _, task, size = MODELS[name]
    x = torch.rand(size)
    if task == "super_resolution":
        return x, torch.rand(*size[:2], 2 * size[2], 2 * size[3])
    return x, torch.randint(0, 10, size[:1])


def compiled(name: str, devices: int = 1) -> glcan_fx.LocalModel:
    torch.manual_seed(0)
    make, task, size = MODELS[name]
    return glcan_fx.transform(make(), k="natural", task=task, example_inputs=torch.empty(size, device="meta"),
                              devices=devices).train()


def one_rank(name: str) -> float:
    """Seconds of a step in one process, over the same micro-batches."""
    local = compiled(name)
    optimizer = torch.optim.SGD(local.parameters(), lr=1e-3, momentum=0.9)
    x, y = batch(name)

    def step() -> None:
        optimizer.zero_grad()
        for part in zip(x.chunk(MICRO), y.chunk(MICRO), strict=True):
            (local(*part).loss / MICRO).backward()
        optimizer.step()

    return medians([step], STEPS, warm_up=1)[0]


def rank(name: str, index: int, folder: Path) -> None:
    """One of two ranks: seconds of a step, and in its local modules; its peak."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    local = compiled(name, devices=2)
    pipe = glcan_fx.distributed.pipeline(local, micro_batches=MICRO)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=1e-3, momentum=0.9)
    busy = [0.0]
    run = local.differentiate_stage

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        run(*args)
        busy[0] += time.perf_counter() - began

    local.__dict__["differentiate_stage"] = timed
    x, y = batch(name)

    def step() -> None:
        optimizer.zero_grad()
        pipe.step(x, y)
        began = time.perf_counter()
        optimizer.step()
        busy[0] += time.perf_counter() - began

    step()
    step()  # every rank has work
    busy[0], began = 0.0, time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds, working = time.perf_counter() - began, busy[0]
    memory = PeakMemory(pipe, optimizer)  # of its own thread: what arrives ahead arrives in it, too
    channel.ThreadPoolExecutor = AtOnce  # type: ignore[misc, assignment]
    optimizer.zero_grad()
    with memory:
        step()
    found = {"seconds": seconds / STEPS, "busy": working / seconds, "peak": memory.bytes}
    (folder / f"{index}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(name: str) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, "--rank", name, folder]
        processes = [subprocess.Popen([*command, str(index)]) for index in range(2)]
        assert [process.wait() for process in processes] == [0, 0]
        ranks = [json.loads((Path(folder) / f"{index}.json").read_text()) for index in range(2)]
    alone = one_rank(name)
    plan = compiled(name, devices=2).plan
    planned = plan.on_ranks(MICRO)
    seconds = max(r["seconds"] for r in ranks)
    peaks = ", ".join(f"{r['peak'] / 2**20:.1f} ({r['peak'] / p.peak:.3f})"
                      for r, p in zip(ranks, planned, strict=True))
    idle = ", ".join(f"{1 - r['busy']:.1%}" for r in ranks)
    return (f"| {name} | {' + '.join(map(str, plan.ranks))} | {alone / seconds:.2f} | {idle} | {bubble(planned):.1%} | "
            f"{peaks} |")


# ------------------------------------------------------------ data parallel over a slow link

LINK = """
for r in 0 1; do ip netns del glcan$r 2>/dev/null || true; ip netns add glcan$r; ip -n glcan$r link set lo up; done
ip link add veth0 netns glcan0 type veth peer name veth1 netns glcan1
for r in 0 1; do
  ip -n glcan$r addr add 10.99.0.$((r+1))/24 dev veth$r; ip -n glcan$r link set veth$r up
  ip netns exec glcan$r tc qdisc add dev veth$r root tbf rate {rate} burst 256kb latency 400ms
done
"""
RATES = ("200mbit", "800mbit")
WAYS = ("alone", "DistributedDataParallel", "overlap")


def parallel(name: str, index: int, folder: Path) -> None:
    """Seconds of a step of each way, on one of two ranks in network namespaces of their own."""
    dist.init_process_group("gloo", init_method="tcp://10.99.0.1:29533", rank=index, world_size=2)
    found = {}
    x, y = batch(name)
    for way in WAYS:
        local: Any = compiled(name)
        if way != "alone":
            local = DistributedDataParallel(local, broadcast_buffers=False)
        if way == "overlap":
            glcan_fx.distributed.overlap(local)
        optimizer = torch.optim.SGD(local.parameters(), lr=1e-3, momentum=0.9)

        def step(local: Any = local, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            local(x, y).loss.backward()
            optimizer.step()

        _, found[way] = medians([dist.barrier, step], STEPS, warm_up=1)
    (folder / f"{index}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def over_a_link(name: str, rate: str) -> str:
    """A row of the table: seconds of a step of each way."""
    subprocess.run(["sh", "-ec", LINK.format(rate=rate)], check=True)
    with tempfile.TemporaryDirectory() as folder:
        processes = [subprocess.Popen(
            ["ip", "netns", "exec", f"glcan{index}", sys.executable, "-W", "ignore", __file__, "--parallel", name,
             folder, str(index)], env={**os.environ, "GLOO_SOCKET_IFNAME": f"veth{index}"}) for index in range(2)]
        assert [process.wait() for process in processes] == [0, 0]
        ranks = [json.loads((Path(folder) / f"{index}.json").read_text()) for index in range(2)]
    for index in range(2):
        subprocess.run(["ip", "netns", "del", f"glcan{index}"], check=True)
    return f"| {name}, {rate} | {' | '.join(f'{max(r[way] for r in ranks):.2f}' for way in WAYS)} |"


# ------------------------------------------------------------ on paper


def on_paper(target: str, ranks: int, copies: int, micro: int, count: int) -> list[str]:
    """Rows for a pipeline of ``ranks`` ranks beside ``copies`` others, ``count`` micro-batches of ``micro`` images a
    step: what the busiest, or largest, rank needs. Formulas are in the page."""
    preset = PRESETS[target]
    images, *size = preset.inputs[0]
    model = load(preset.target, preset.kwargs)
    planned = glcan_fx.plan(model, k="natural", task=preset.task, example_inputs=torch.empty(
        images, *size, device="meta"), devices=ranks)
    local = planned.on_ranks(images // micro)
    weights = [sum(m.parameters for m in planned.modules[r.modules.start:r.modules.stop]) * 4 for r in local]
    aux = [sum(m.aux_parameters for m in planned.modules[r.modules.start:r.modules.stop]) * 4 for r in local]
    saved = [sum(m.saved for m in planned.modules[r.modules.start:r.modules.stop]) * micro / images for r in local]
    sent = [r.sent * micro / images for r in local]  # of a micro-batch
    between = [sent[i] + (sent[i - 1] if i else 0) for i in range(ranks)]  # sent and received

    def shared(size: float) -> float:  # of an all-reduce, by each rank
        return 2 * (copies - 1) / copies * size

    plain = planned.memory.backpropagation
    again = planned.memory.checkpointing
    assert again is not None
    everything, processes = sum(weights), ranks * copies
    each = count * micro // ranks  # images of a rank that has the whole model
    whole = [part for name, part in again.parts.items() if name in ("parameters", "gradients", "optimizer state")]
    fsdp = 3 * everything / processes + 2 * everything / planned.k + (again.peak - sum(whole)) * each / images
    rows = [
        ("local modules, pipeline", max(r.peak for r in local),
         max(count * b + shared(w + a) for b, w, a in zip(between, weights, aux, strict=True)), bubble(local),
         planned.memory.plan.flops / plain.flops),
        ("backpropagation, pipeline (1F1B)",
         max(3 * w + (ranks - i) * s for i, (w, s) in enumerate(zip(weights, saved, strict=True))),
         max(2 * count * b + shared(w) for b, w in zip(between, weights, strict=True)),
         1 - (1 - bubble(local)) * count / (count + ranks - 1), 1.0),
        ("FSDP2, every block checkpointed", fsdp, 3 * (processes - 1) / processes * everything, 0.0,
         again.flops / plain.flops),
    ]
    return [f"| {name} | {peak / 2**30:.2f} | {traffic / 2**30:.2f} | {idle:.0%} | {compute:.2f} |"
            for name, peak, traffic, idle, compute in rows]


PAPER = (("resnet34", 32, 64), ("edsr-full", 2, 64), ("retinanet-r50", 2, 32))
HEADS = {
    "pipeline": "| model | local modules, rank 0 + 1 | throughput, of one process | idle, rank 0, rank 1 | waits for "
                "the busiest, planned | peak, MiB (of the plan's) |",
    "link": "| seconds of a step | alone | DistributedDataParallel | overlap |",
    "paper": "| | memory, GiB | traffic, GiB | idle | compute |",
}


def part(name: str) -> str:
    """A part of the page, as it stands between its marks."""
    lines = [HEADS[name], "|---" * (HEADS[name].count("|") - 1) + "|"]
    if name == "pipeline":
        lines += map(measured, MODELS)
    elif name == "link":
        lines += [over_a_link(next(iter(MODELS)), rate) for rate in RATES]
    else:
        for target, micro, count in PAPER:
            for copies in (1, 8):
                lines.append(f"| **{target}, {8 * copies} GPUs**, {count * micro * copies} images a step | | | | |")
                lines += on_paper(target, 8, copies, micro, count)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return "\n".join([*lines, "", f"`docs/make_distributed.py {name}`; seed 0, {platform.machine()}, one thread a "
                      f"process, torch {torch.__version__}, commit {commit}."])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=[], choices=[*HEADS, []], help="(all; link makes "
                        "network namespaces, which needs root, ip and tc)")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--parallel", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rank or args.parallel:
        name, folder, index = args.rank or args.parallel
        (rank if args.rank else parallel)(name, int(index), Path(folder))
        return
    page = Path(__file__).with_name("distributed.md")
    for name in args.parts or HEADS:
        made = part(name)
        print(made, flush=True)
        before, mark, rest = page.read_text().partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page.write_text(f"{before}{mark}{made}\n{end}{after}")


if __name__ == "__main__":
    main()
