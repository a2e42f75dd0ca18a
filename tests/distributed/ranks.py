"""What one of several processes sees, which are ranks of gloo.

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
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from divided_networks import (
    SEEN,
    SINGLE,
    Dropping,
    batch_of,
    build,
    dropping,
    gradients,
    loss_of,
    regression,
    regression_batch,
    resnet,
    token,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import glcan_fx
from glcan_fx.distributed import channel
from glcan_fx.peak_memory import PeakMemory

FOLDER, CHOSEN = Path(sys.argv[4] if __name__ == "__main__" else "."), sys.argv[5:]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # each rank's under its parameters' names
COUNTED = ("resnet", "edsr")  # of the second, inputs and targets are a large part
WAYS = ("plain", "overlap", "stages", "whole")  # of DistributedDataParallel, and of fully_shard


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
        yield f"{name}: weights", pipe.gather().state_dict()


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
        yield f"{way}: weights", parallel.module.state_dict()


def mixed(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """FSDP2 on every local module, in mixed precision."""
    local = regression()
    for stage in local.stages:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        fully_shard(stage, mesh=init_device_mesh("cpu", (ranks,)), mp_policy=policy)
    local(*(part[2 * rank:2 * rank + 2] for part in regression_batch())).loss.backward()
    yield "targets", SEEN
    yield "gradients", gradients(local)
    norm = nn.utils.clip_grad_norm_(local.parameters(), 1e-3)
    yield "norm", norm.full_tensor()
    yield "clipped", gradients(local)


def different(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """Ranks that train different parameters, or say different things; what is refused."""
    for way in ("plain", "overlap"):
        parallel = DistributedDataParallel(dropping(rank), find_unused_parameters=True)
        if way == "overlap":
            glcan_fx.distributed.overlap(parallel)
        for step in range(3):
            with parallel.no_sync() if step == 0 else nullcontext():
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
        (divided("resnet", "overlap")[0](*half("resnet", 0, rank)).loss * (1 + rank)).backward()

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
    yield "resumed", pipe.state_dict()


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
