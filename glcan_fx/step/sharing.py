"""What local modules share, so that they cannot be on different ranks, or sharded one by one."""

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from glcan_fx.errors import UnsupportedError
from glcan_fx.step.averages import Averages
from glcan_fx.step.parts import ReadOnly
from glcan_fx.step.stages import Share

if TYPE_CHECKING:
    from glcan_fx.step.local_model import LocalModel

Link = tuple[int, int, str]
"""Two local modules that need each other's tensors, and why."""


def links_of(local: "LocalModel") -> list[Link]:
    """Local modules that share something: a loss that trains several, a parameter, weights that are read."""
    plan, found = local.plan, []
    for index, reach in enumerate(plan.reaches):
        if reach.first < reach.until:
            found.append((reach.first, reach.until, f"with method='{plan.method.name}' the loss of "
                          f"'{plan.modules[index].name}' passes through several local modules"))
    if plan.method.agreement and plan.k > 1:
        found.append((0, plan.k - 1, f"method='{plan.method.name}' compares gradients on both sides of a cut"))
    owner: dict[int, int] = {}
    shares = []
    for index, paths in enumerate(local.paths_by_stage()):
        share = Share.of(local, paths)
        shares.append(share)
        for name, parameter in share.named_parameters():
            first = owner.setdefault(id(parameter), index)
            if first != index:
                found.append((first, index, f"both train the parameter '{name}'"))
    if "task" in local.aux._modules and plan.k > 1:
        found.append((0, plan.k - 1, "the criterion has parameters, which every local loss trains"))
    for index, share in enumerate(shares):
        for part in share.modules():
            for path in _read_by(part):
                first, last = sorted((index, owner.get(id(local.original.get_parameter(path)), index)))
                if first != last:
                    found.append((first, last, f"an auxiliary network reads the weights of '{path}'"))
    return found


def _read_by(part: nn.Module) -> list[str]:
    """Paths of the model's parameters that a part of an auxiliary network reads."""
    if isinstance(part, Averages):
        return list(part.__dict__["follows"].values())
    if isinstance(part, ReadOnly) and part.__dict__["model"] is not None:
        path = part.__dict__["path"]
        layer = part.__dict__["model"].get_submodule(path)
        return [f"{path}.{name}" for name, _ in layer.named_parameters()]
    return []


def refuse_sharded(local: "LocalModel") -> None:
    """Raise UnsupportedError where FSDP2 shards parts whose hooks the training step does not run: gradients would be
    wrong."""
    if "torch.distributed.tensor" not in sys.modules or "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    stages: list[Any] = [stage for stage in local.__dict__["_stages"] if isinstance(stage, FSDPModule)]
    averages = any(isinstance(part, Averages) for part in local.aux.modules())
    if averages and (stages or isinstance(local, FSDPModule)):
        raise UnsupportedError(
            f"method='{local.plan.method.name}' has averages that follow the model's weights after each step of the "
            "optimizer, which a sharded model does not show. Use DistributedDataParallel, or another method.")
    managed = {id(p) for stage in stages for p in stage.parameters()}
    own = dict(local.named_parameters(remove_duplicate=False)) if stages else {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if own.get(name) is not parameter:
                raise UnsupportedError(
                    f"parameter '{name}' was sharded by fully_shard() on a local module, but belongs itself to a "
                    f"module that several local modules divide, which has another one now. Make it a part of a module "
                    "of its own, or shard the whole compiled model: fully_shard(local).")
    for name, parameter in local.named_parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in managed:
            raise UnsupportedError(
                f"parameter '{name}' is sharded by fully_shard() on a part of a local module, whose hooks the compiled "
                "training step does not run. Shard local modules, for stage in local.stages: fully_shard(stage), or "
                "the whole compiled model, fully_shard(local), and nothing inside.")
