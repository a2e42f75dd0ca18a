"""Networks that are trained on several ranks, their batches, and what one process makes of them."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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


@cache
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


class Dropping(nn.Sequential):
    """Random numbers are drawn in the last local module, and in auxiliary networks."""

    def __init__(self) -> None:
        blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.ReLU()) for _ in range(3)]
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5),
                         nn.Linear(8, 5))
