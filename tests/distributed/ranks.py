"""Networks that are trained on several ranks, and what a rank of gloo does with them.

Run as a script, ``ranks.py WHAT,... RANK RANKS FOLDER NETWORK...`` is one process; it leaves what it saw in
``FOLDER/rank<RANK>.pt``.
"""

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.models.resnet import BasicBlock, ResNet

import glcan_fx
from glcan_fx.distributed import channel
from glcan_fx.models import edsr, retinanet
from glcan_fx.peak_memory import PeakMemory

FOLDER, CHOSEN = Path(sys.argv[4] if __name__ == "__main__" else "."), sys.argv[5:]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # each rank's under its parameters' names


class UNet(nn.Module):
    """Two levels; a value made early is read late."""

    def __init__(self) -> None:
        super().__init__()
        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(2, outputs), nn.ReLU())
        self.down1, self.down2, self.down3 = block(3, 8), block(8, 16, 2), block(16, 16, 2)
        self.up2, self.up1, self.head = block(32, 16), block(24, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        c = self.down3(b)
        d = self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        return self.head(self.up1(torch.cat([F.interpolate(d, scale_factor=2.0), a], 1)))


COUNTED = ("resnet", "edsr")  # of the second, inputs and targets are a large part
SINGLE = ("resnet", "unet", "retinanet", "edsr")  # that train on a single image
GROUPS = partial(nn.GroupNorm, 4)


def resnet(norm: Callable[[int], nn.Module] = GROUPS) -> nn.Module:
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, norm_layer=norm)
    net.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    return net


def small_retinanet() -> nn.Module:
    return retinanet(18, num_classes=3, fpn_channels=32, extra_levels=False, min_size=64, max_size=96,
                     trainable_layers=5)


def batch_of(name: str, seed: int, count: int = 4) -> tuple[Any, ...]:
    made = torch.Generator().manual_seed(seed)
    if name == "retinanet":  # of other sizes in every step
        side = 64 + 16 * (seed % 3)
        images = [torch.rand(3, 64, side, generator=made) for _ in range(count)]
        return images, [{"boxes": torch.tensor([[4.0 + i, 5.0, 40.0, 50.0 + i]] * (1 + i)),
                         "labels": torch.ones(1 + i, dtype=torch.long)} for i in range(count)]
    x = torch.randn(count, 3, 32, 32, generator=made)
    if name == "unet":
        return x, torch.randint(0, 4, (count, 32, 32), generator=made)
    if name == "edsr":
        return x, torch.rand(count, 3, 64, 64, generator=made)
    return x, torch.randint(0, 5, (count,), generator=made)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet": (resnet, "classification"),
    "batchnorm": (lambda: resnet(nn.BatchNorm2d), "classification"),
    "unet": (UNet, "segmentation"),
    "retinanet": (small_retinanet, "detection"),
    "edsr": (lambda: edsr(blocks=4, channels=8, scale=2), "super_resolution"),
}


def build(name: str, k: int = 3, **options: Any) -> glcan_fx.LocalModel:
    """A compiled network, with the same weights at every call."""
    torch.manual_seed(0)
    model, task = NETWORKS[name][0](), NETWORKS[name][1]
    inputs = [torch.rand(3, 64, 64)] * 2 if task == "detection" else batch_of(name, 0)[0]
    return glcan_fx.transform(model, k=k, task=task, example_inputs=inputs, **options).train()


SEEN: list[torch.dtype] = []


def regression() -> glcan_fx.LocalModel:
    """A U-Net with a criterion that notes what type targets are of."""
    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        SEEN.append(targets.dtype)
        return F.mse_loss(outputs.float(), targets)

    torch.manual_seed(0)
    local = glcan_fx.transform(UNet(), k=3, criterion=criterion, example_inputs=torch.rand(2, 3, 32, 32)).train()
    SEEN.clear()
    return local


def regression_batch() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=made), torch.randn(4, 4, 32, 32, generator=made)


def loss_of(out: Any) -> Tensor:
    return sum(out.values()) if isinstance(out, dict) else out.loss


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of a module's parameters; whole ones, of those that are sharded."""
    return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.detach().clone()
            for name, p in module.named_parameters() if p.grad is not None}


def in_one_process(name: str, steps: int = 2, parts: int = 2, **options: Any) -> dict[str, Any]:
    """The same batches with accumulation over the same parts."""
    local = build(name, **options)
    optimizer = torch.optim.SGD(local.parameters(), lr=1e-2)
    seen: dict[str, Any] = {}
    seen["losses"] = []
    for step in range(steps):
        optimizer.zero_grad()
        inputs, targets = batch_of(name, step % 5)
        losses: dict[str, Tensor] = {}
        size = len(inputs) // parts
        for start in range(0, len(inputs), size):
            out = local(inputs[start:start + size], targets[start:start + size])
            (loss_of(out) / parts).backward()
            own = [v for k, v in out.items() if k.startswith("loss_local")] if isinstance(out, dict) else out.losses
            if isinstance(out, dict):
                own.append(loss_of(out) - sum(own))
            for module, loss in zip(local.plan.modules, own, strict=True):
                losses[module.name] = losses.get(module.name, 0) + loss.detach() / parts
        seen["losses"].append(losses)
        seen[f"gradients {step}"] = gradients(local)
        optimizer.step()
    seen["weights"] = {name: t.clone() for name, t in local.state_dict().items()}
    return seen


# ------------------------------------------------------------ one of several processes


def pipelines(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    for name in CHOSEN:
        local = build(name)
        pipe = glcan_fx.distributed.pipeline(local, micro_batches=2)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=1e-2)
        for step in range(2):
            optimizer.zero_grad()
            out = pipe.step(*batch_of(name, step)) if rank == 0 else pipe.step()
            yield f"{name}: gradients {step}", gradients(pipe)
            yield f"{name}: losses {step}", out.losses
            optimizer.step()
        yield f"{name}: own", sorted(pipe.state_dict())
        yield f"{name}: weights", {key: t.clone() for key, t in pipe.gather().state_dict().items()}


class AtOnce(nullcontext[Any]):
    """Runs what is submitted, in this thread, so that what arrives ahead is counted."""

    def __enter__(self) -> Any:
        return self

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function())
        return future


def memory(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """The peak of the third step."""
    threads, channel.ThreadPoolExecutor = channel.ThreadPoolExecutor, AtOnce
    for name in COUNTED:
        pipe = glcan_fx.distributed.pipeline(build(name, devices=ranks), micro_batches=4)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=1e-2, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            batch = batch_of(name, step) if rank == 0 else ()
            with PeakMemory(pipe, optimizer) as counted:
                pipe.step(*batch)
                optimizer.step()
        yield name, counted.bytes
    channel.ThreadPoolExecutor = threads


def half(name: str, seed: int, rank: int, ranks: int = 2) -> tuple[Any, ...]:
    size = 4 // ranks
    return tuple(part[rank * size:(rank + 1) * size] for part in batch_of(name, seed))


WAYS = ("plain", "overlap", "stages", "whole")  # of DistributedDataParallel, and of fully_shard


def divided(name: str, way: str) -> tuple[nn.Module, glcan_fx.LocalModel]:
    """What is called with each rank's half of a batch, and the compiled model in it."""
    local = build(name)
    if way in ("stages", "whole"):
        for root in local.stages if way == "stages" else [local]:
            fully_shard(root, mesh=init_device_mesh("cpu", (2,)))
        return local, local
    parallel = DistributedDataParallel(local, broadcast_buffers=False)
    return glcan_fx.distributed.overlap(parallel) if way == "overlap" else parallel, local


def data_parallel(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """Each rank trains on its half of the batch."""
    for name, way in product(CHOSEN, WAYS):
        called, local = divided(name, way)
        optimizer = torch.optim.SGD(local.parameters(), lr=1e-2)
        for step in range(2):
            optimizer.zero_grad()
            with sizes_sent() as sent:
                loss = loss_of(called(*half(name, step, rank)))
            yield f"{name}, {way}: sent", sum(sent)
            loss.backward()
            yield f"{name}, {way}: gradients {step}", gradients(local)
            optimizer.step()
        if name == "resnet":
            dcp.save({"model": local.state_dict()}, checkpoint_id=FOLDER / way)
            plain = {"model": resnet().state_dict()}
            dcp.load(plain, checkpoint_id=FOLDER / way)
            yield f"{way}: plain", plain["model"]


def curves(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """The sum of this rank's losses in 50 steps."""
    for name, way in product(CHOSEN, ("pipeline", *WAYS)):
        called: Any
        if way == "pipeline":
            local = called = glcan_fx.distributed.pipeline(build(name), micro_batches=2)
        else:
            called, local = divided(name, way)
        optimizer = torch.optim.SGD(local.parameters(), lr=1e-2)
        found = []
        for step in range(50):
            optimizer.zero_grad()
            if way == "pipeline":
                loss = torch.stack(list(called.step(*batch_of(name, step % 5)).losses.values())).sum()
            else:
                loss = loss_of(called(*half(name, step % 5, rank)))
                loss.backward()
            found.append(loss.detach())
            optimizer.step()
        yield f"{name}, {way}", torch.stack(found)


@contextmanager
def sizes_sent() -> Iterator[list[int]]:
    """How many numbers each all_reduce averages."""
    real, sent = dist.all_reduce, []
    dist.all_reduce = lambda tensor, *args, **options: sent.append(tensor.numel()) or real(tensor, *args, **options)
    try:
        yield sent
    finally:
        dist.all_reduce = real


def accumulated(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """Two micro-batches a rank, of which the first is not synchronised; twice, without zero_grad() between."""
    for way in ("plain", "overlap"):
        parallel = DistributedDataParallel(build("resnet"))
        if way == "overlap":
            glcan_fx.distributed.overlap(parallel)
        for step in range(2):
            images, labels = half("resnet", step, rank)
            with parallel.no_sync():
                (parallel(images[:1], labels[:1]).loss / 2).backward()
            yield f"{way}: before {step}", gradients(parallel.module)
            (parallel(images[1:], labels[1:]).loss / 2).backward()
            yield f"{way}: after {step}", gradients(parallel.module)


def uneven(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """The second rank has a batch more."""
    for way in ("plain", "overlap"):
        parallel = DistributedDataParallel(build("resnet"))
        if way == "overlap":
            glcan_fx.distributed.overlap(parallel)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-2)
        with parallel.join():
            for step in range(1 + rank):
                optimizer.zero_grad()
                parallel(*half("resnet", step, rank)).loss.backward()
                optimizer.step()
        yield f"{way}: weights", {key: t.clone() for key, t in parallel.module.state_dict().items()}


def mixed(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """FSDP2 on every local module, in mixed precision."""
    mesh = init_device_mesh("cpu", (ranks,))
    local = regression()
    for stage in local.stages:
        fully_shard(stage, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    local(*(part[2 * rank:2 * rank + 2] for part in regression_batch())).loss.backward()
    yield "targets", SEEN
    yield "gradients", gradients(local)
    norm = nn.utils.clip_grad_norm_(local.parameters(), 1e-3)
    yield "norm", norm.full_tensor()
    yield "clipped", gradients(local)


class Dropped(nn.Module):
    """Of two layers one runs, as the flag says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.first = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), True

    def forward(self, x: Tensor) -> Tensor:
        return F.relu((self.a if self.first else self.b)(x))


class Token(nn.Module):
    """Tokens with a parameter that belongs to the network itself; ``late``: and one behind the blocks; ``tied``,
    ``shared``: blocks have a parameter, or a layer, in common."""

    def __init__(self, late: bool = False, tied: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.place = nn.Parameter(torch.zeros(1, 16, 16))
        self.scale = nn.Parameter(torch.ones(16)) if late else None
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
        if tied:
            self.blocks[2][1].weight = self.blocks[0][1].weight
        if shared:
            self.blocks[2][1] = self.blocks[0][1]
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch(x).flatten(2).transpose(1, 2) + self.place)
        return self.head((x if self.scale is None else x * self.scale).mean(1))


def dropping(rank: int) -> glcan_fx.LocalModel:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 8, 3, 2, 1), *(Dropped() for _ in range(2)), nn.Conv2d(8, 8, 3, 2, 1)]
    local = glcan_fx.transform(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), k=3,
                               task="classification", example_inputs=batch_of("resnet", 0)[0]).train()
    for part in local.modules():
        if isinstance(part, Dropped):
            part.first = rank == 0
    return local


def token(**options: bool) -> glcan_fx.LocalModel:
    torch.manual_seed(0)
    return glcan_fx.transform(Token(**options), k=3, task="classification",
                              example_inputs=batch_of("resnet", 0)[0]).train()


def different(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """Ranks that train different parameters, or say different things; what is refused."""
    for way in ("plain", "overlap"):
        parallel = DistributedDataParallel(dropping(rank), find_unused_parameters=True)
        if way == "overlap":
            glcan_fx.distributed.overlap(parallel)
        for step in range(2):
            parallel(*half("resnet", step, rank)).loss.backward()
        yield f"dropped, {way}", gradients(parallel.module)
    averaged = AveragedModel(parallel)
    yield "average", torch.equal(averaged.eval()(batch_of("resnet", 0)[0]), parallel.eval()(batch_of("resnet", 0)[0]))

    def refused(what: str, run: Callable[[], Any]) -> tuple[str, Any]:
        try:
            return what, run()
        except Exception as error:
            return what, f"{type(error).__name__}: {error}"

    def weighted() -> None:
        parallel = glcan_fx.distributed.overlap(DistributedDataParallel(build("resnet")))
        (parallel(*half("resnet", 0, rank)).loss * (1 + rank)).backward()

    def shard(local: glcan_fx.LocalModel) -> dict[str, Tensor]:
        for stage in local.stages:
            fully_shard(stage, mesh=init_device_mesh("cpu", (ranks,)))
        local(*half("resnet", 0, rank)).loss.backward()
        return gradients(local)

    def synchronised() -> Any:
        return nn.SyncBatchNorm.convert_sync_batchnorm(build("batchnorm"))

    def replaced() -> None:
        pipe = glcan_fx.distributed.pipeline(build("resnet"))
        pipe.local.conv1 = pipe.local.fc = nn.Linear(1, 1)
        pipe.step()

    yield refused("weighted", weighted)
    yield refused("token", lambda: shard(token()))
    yield refused("late token", lambda: shard(token(late=True)))
    yield refused("tied", lambda: shard(token(tied=True)))
    yield refused("shared", lambda: shard(token(shared=True)))
    yield refused("synchronised", lambda: DistributedDataParallel(synchronised())(*half("resnet", 0, rank)))
    yield refused("synchronised pipeline", lambda: glcan_fx.distributed.pipeline(synchronised()).step())
    yield refused("replaced", replaced)
    yield refused("micro-batches", lambda: glcan_fx.distributed.pipeline(build("resnet"), micro_batches=2 + 2 * rank))
    yield refused("no micro-batches", lambda: glcan_fx.distributed.pipeline(build("resnet"), micro_batches=0))
    pipe = glcan_fx.distributed.pipeline(build("resnet"), micro_batches=2)
    x, y = batch_of("resnet", 0)

    def half_precision() -> None:
        with torch.autocast("cpu", torch.float16):
            pipe.step(x, y)

    yield refused("float16", half_precision)
    pipe.eval()
    yield refused("evaluation", lambda: pipe.step(x, y))
    pipe.train()
    if rank == 0:
        yield refused("packed targets", lambda: pipe.step(x, torch.zeros(7, dtype=torch.long)))
    yield refused("right", lambda: list(pipe.step(x, y).losses))
    with pipe.local.stages[-1].register_forward_hook(lambda *_: 1 / 0):
        yield refused("fails", lambda: pipe.step(x, y))
    if rank == ranks - 1:
        yield refused("behind a failure", lambda: pipe.step(x, y))


class Dropping(nn.Sequential):
    """Random numbers are drawn in the last local module, and in auxiliary networks."""

    def __init__(self) -> None:
        blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.ReLU()) for _ in range(3)]
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5),
                         nn.Linear(8, 5))


def random_numbers(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """Of each rank; all train on the same batch."""
    batch = batch_of("resnet", 0)

    def compiled() -> glcan_fx.LocalModel:
        return glcan_fx.transform(Dropping(), k=2, task="classification", example_inputs=batch[0]).train()

    torch.manual_seed(rank)
    parallel = DistributedDataParallel(compiled())
    alone, state = copy.deepcopy(parallel.module), torch.get_rng_state()
    glcan_fx.distributed.overlap(parallel)
    yield "parallel", parallel(*batch).loss.detach()
    torch.set_rng_state(state)
    yield "parallel, alone", alone(*batch).loss.detach()
    pipe = glcan_fx.distributed.pipeline(compiled(), micro_batches=1)
    alone, state = copy.deepcopy(pipe.gather()), torch.get_rng_state()
    yield "pipeline", list(pipe.step(*batch).losses.values())
    torch.set_rng_state(state)
    yield "pipeline, alone", [alone(*batch).losses[rank].detach()]


def sharded_pipeline(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """Each rank's local modules are sharded, among as many ranks as run them: one."""
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "pipeline"))
    local = build("resnet")
    pipe = glcan_fx.distributed.pipeline(local, micro_batches=2, group=mesh["pipeline"].get_group(),
                                         data_group=mesh["data"].get_group())
    for stage in pipe.stages:
        fully_shard(stage, mesh=mesh["data"])
    pipe.step(*batch_of("resnet", 0))
    yield "gradients", gradients(pipe)
    try:
        pipe.gather()
    except glcan_fx.UnsupportedError as error:
        yield "gather", str(error)


def both(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """Two pipelines of two ranks each, on halves of the batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
    groups = {"group": mesh["pipeline"].get_group(), "data_group": mesh["data"].get_group()}
    for name in [name for name in SINGLE if name in CHOSEN]:
        local = build(name)
        pipe = glcan_fx.distributed.pipeline(local, micro_batches=2, **groups)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=1e-2)
        for step in range(2):
            optimizer.zero_grad()
            pipe.step(*half(name, step, mesh["data"].get_local_rank()))
            yield f"{name}: gradients {step}", gradients(pipe)
            optimizer.step()


def checkpoints(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """A run that is saved after a step, and one that goes on from there."""
    folder = FOLDER / "checkpoint"

    def state(pipe: Any, optimizer: Any) -> dict[str, Any]:
        return {"model": pipe.state_dict(), "optimizer": get_optimizer_state_dict(pipe, optimizer, options=FLAT)}

    def begin() -> tuple[Any, Any]:
        pipe = glcan_fx.distributed.pipeline(build("batchnorm"), micro_batches=2)
        return pipe, torch.optim.SGD(pipe.parameters(), lr=1e-2, momentum=0.9)

    def train(pipe: Any, optimizer: Any, step: int) -> None:
        optimizer.zero_grad()
        pipe.step(*batch_of("batchnorm", step))
        optimizer.step()

    pipe, optimizer = begin()
    train(pipe, optimizer, 0)
    dcp.save(state(pipe, optimizer), checkpoint_id=folder)
    train(pipe, optimizer, 1)
    yield "straight", {key: t.clone() for key, t in pipe.state_dict().items()}
    pipe, optimizer = begin()
    found = state(pipe, optimizer)
    dcp.load(found, checkpoint_id=folder)
    pipe.load_state_dict(found["model"])
    set_optimizer_state_dict(pipe, optimizer, found["optimizer"], options=FLAT)
    train(pipe, optimizer, 1)
    yield "resumed", {key: t.clone() for key, t in pipe.state_dict().items()}


def deaths(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """The last rank ends in the second step."""
    pipe = glcan_fx.distributed.pipeline(build("resnet"), micro_batches=2)
    pipe.step(*batch_of("resnet", 0))
    if rank == ranks - 1:
        torch.save({"deaths": {}}, FOLDER / f"rank{rank}.pt")
        os._exit(0)
    began = time.monotonic()
    try:
        for step in range(3):
            pipe.step(*batch_of("resnet", step))
    except glcan_fx.RankError as error:
        yield "error", str(error)
        yield "seconds", time.monotonic() - began


PARTS = {part.__name__: part for part in (
    pipelines, memory, curves, data_parallel, accumulated, uneven, mixed, both, checkpoints, deaths, different,
    random_numbers, sharded_pipeline)}


def run(what: str, ranks: int, folder: Path, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What each of several processes saw."""
    command = [sys.executable, "-W", "ignore", __file__, what]
    processes = [subprocess.Popen([*command, str(rank), str(ranks), str(folder), *names], stderr=subprocess.PIPE,
                                  text=True) for rank in range(ranks)]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def main(what: str, rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{what}", rank=rank, world_size=ranks)
    torch.save({part: dict(PARTS[part](rank, ranks)) for part in what.split(",")}, folder / f"rank{rank}.pt")
    if what != "deaths":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
