"""The small network that the loop tests train, and what two processes do with it.

Run as a script, ``loops_ddp.py RANK FOLDER`` is one of two gloo processes: it trains under
DistributedDataParallel and FSDP2 and leaves what it saw in ``FOLDER/rank<RANK>.pt``, for test_loops.py.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import glcan_fx
from glcan_fx import LocalModel
from glcan_fx.methods import DGL, GLCAN, HPFF, MAN, SGR, Method
from glcan_fx.step.output import total

EXAMPLE = torch.empty(2, 3, 8, 8)
Norm = Callable[[int], nn.Module]
GROUPS: Norm = partial(nn.GroupNorm, 2)  # no batch statistics: the same result however the batch is split


class Block(nn.Module):
    """A residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class Net(nn.Module):
    """A residual classifier of 3 x 8 x 8 images that offers four local modules: stem and three blocks."""

    def __init__(self, norm: Norm = nn.BatchNorm2d, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), norm(8), nn.ReLU())
        self.block1 = Block(8, 8, 1, norm)
        self.block2 = Block(8, 16, 2, norm)
        self.block3 = Block(16, 16, 1, norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.block3(self.block2(self.block1(self.stem(x))))).flatten(1))


def build(norm: Norm = nn.BatchNorm2d, **options: Any) -> LocalModel:
    """The compiled Net, with the same weights at every call."""
    torch.manual_seed(0)
    if "criterion" not in options:
        options["task"] = "classification"
    return glcan_fx.transform(Net(norm), **{"k": "natural", "example_inputs": EXAMPLE, **options})


def batch(size: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(0, 5, (size,), generator=generator))


class PlainAutograd(fx.Interpreter):
    """Runs a compiled module's graph without early backward passes: every local loss is an ordinary one."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not re.fullmatch(r"aux\.(\d+|last)", str(target)):
            return super().call_module(target, args, kwargs)
        part = self.fetch_attr(target)
        loss = part.head(part.network(*args) if hasattr(part, "network") else args[0], *kwargs["context"])
        return loss if target == "aux.last" else total(loss)


def plain_step(local: LocalModel, *inputs: Any) -> Any:
    """What ``local(*inputs)`` must equal: detached modules, one backward for the sum of their losses."""
    return PlainAutograd(local).run(*inputs)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# ------------------------------------------------------------ one of two processes


def ddp(rank: int) -> Iterator[tuple[str, Any]]:
    """Each rank trains on half the batch for three iterations."""
    for name, norm in (("groups", GROUPS), ("batch norm", nn.BatchNorm2d)):
        local = build(norm)
        parallel = DistributedDataParallel(local)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        for iteration in range(3):
            images, labels = (part.chunk(2)[rank] for part in batch(seed=iteration))
            optimizer.zero_grad()
            parallel(images, labels).loss.backward()
            yield f"{name}: gradients {iteration}", gradients(local)
            optimizer.step()
        yield f"{name}: weights", weights(local)


METHODS: dict[str, Method] = {"ahead": GLCAN(ahead=1), "window": GLCAN(window=2), "man": MAN(base=GLCAN(hidden=0)),
                              "hpff": HPFF(base=DGL(width=1.0)), "sgr": SGR(base=GLCAN(hidden=0))}


def by_method(rank: int) -> Iterator[tuple[str, Any]]:
    """Two iterations with each method, on half the batch: DGL's networks have batch statistics of their own."""
    for name, method in METHODS.items():
        local = build(GROUPS, method=method)
        train(DistributedDataParallel(local), rank)
        yield f"{name}: weights", weights(local)
        yield f"{name}: buffers", {key: value.clone() for key, value in local.named_buffers()}
    local = build(GROUPS, method=METHODS["man"])
    fully_shard(local, mesh=init_device_mesh("cpu", (2,)))
    try:
        train(local, rank)
    except glcan_fx.GlcanFxError as error:
        yield "man: sharded", f"{type(error).__name__}: {error}"


def train(module: nn.Module, rank: int | None = None) -> None:
    """Two steps, of a rank's half of the batch or, in one process, of the whole."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for iteration in range(3):
        images, labels = (part if rank is None else part.chunk(2)[rank] for part in batch(seed=iteration))
        optimizer.zero_grad()
        module(images, labels).loss.backward()
        optimizer.step()


def no_sync(rank: int) -> Iterator[tuple[str, Any]]:
    """Two micro-batches per rank; gradients are exchanged with the second."""
    local = build(GROUPS)
    parallel = DistributedDataParallel(local)
    images, labels = (part.chunk(2)[rank].chunk(2) for part in batch())
    with parallel.no_sync():
        (parallel(images[0], labels[0]).loss / 2).backward()
    yield "no_sync: before", gradients(local)
    (parallel(images[1], labels[1]).loss / 2).backward()
    yield "no_sync: after", gradients(local)


def fsdp(rank: int) -> Iterator[tuple[str, Any]]:
    mesh = init_device_mesh("cpu", (2,))
    local = build(GROUPS)
    fully_shard(local, mesh=mesh)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for iteration in range(2):
        images, labels = (part.chunk(2)[rank] for part in batch(seed=iteration))
        optimizer.zero_grad()
        local(images, labels).loss.backward()
        optimizer.step()
    yield "fsdp: gradients", {name: p.grad.full_tensor() for name, p in local.named_parameters()}
    yield "fsdp: weights", {name: p.full_tensor() for name, p in local.named_parameters()}
    with torch.no_grad():
        yield "fsdp: evaluation", local.eval()(batch()[0])

    for name, roots in (("fsdp: sub-module", ["block2"]), ("fsdp: sub-module and root", ["block2", ""])):
        local = build(GROUPS)
        for root in roots:
            fully_shard(local.get_submodule(root), mesh=mesh)
        try:
            local(*batch())
        except glcan_fx.GlcanFxError as error:
            yield name, f"{type(error).__name__}: {error}"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    seen = {name: value for part in (ddp, no_sync, fsdp, by_method) for name, value in part(rank)}
    torch.save(seen, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
