"""Networks that are trained on several ranks, and what a rank of gloo does with them.

Run as a script, ``ranks.py WHAT RANK RANKS FOLDER`` is one process; it leaves what it saw in ``FOLDER/WHAT<RANK>.pt``.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import glcan_fx
from glcan_fx.models import edsr, retinanet


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


def resnet(norm: Callable[[int], nn.Module] = partial(nn.GroupNorm, 4)) -> nn.Module:
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


def loss_of(out: Any) -> Tensor:
    return sum(out.values()) if isinstance(out, dict) else out.loss


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def in_one_process(name: str, steps: int = 2, parts: int = 2, **options: Any) -> dict[str, Any]:
    """The same batches with accumulation over the same parts."""
    local = build(name, **options)
    optimizer = torch.optim.SGD(local.parameters(), lr=1e-2)
    seen: dict[str, Any] = {}
    for step in range(steps):
        optimizer.zero_grad()
        inputs, targets = batch_of(name, step)
        size = len(inputs) // parts
        for start in range(0, len(inputs), size):
            (loss_of(local(inputs[start:start + size], targets[start:start + size])) / parts).backward()
        seen[f"gradients {step}"] = gradients(local)
        optimizer.step()
    seen["weights"] = {name: t.clone() for name, t in local.state_dict().items()}
    return seen


# ------------------------------------------------------------ one of several processes


def pipelines(rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    for name in NETWORKS:
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


PARTS = {"pipelines": pipelines}


def run(what: str, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each of several processes saw."""
    command = [sys.executable, "-W", "ignore", __file__, what]
    processes = [subprocess.Popen([*command, str(rank), str(ranks), str(folder)], stderr=subprocess.PIPE, text=True)
                 for rank in range(ranks)]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
    return [torch.load(folder / f"{what}{rank}.pt", weights_only=False) for rank in range(ranks)]


def main(what: str, rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{what}", rank=rank, world_size=ranks)
    torch.save(dict(PARTS[what](rank, ranks)), folder / f"{what}{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
