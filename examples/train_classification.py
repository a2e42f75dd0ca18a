"""Train a CIFAR ResNet (He et al. 2016, section 4.2) by backpropagation, checkpointing, DGL or GLCAN.

    python examples/train_classification.py --data DIR --method glcan --k 4

DIR holds CIFAR-10 as torchvision's CIFAR10 reads it (cifar-10-batches-py), or as cifar10_train.npz and cifar10_test.npz
with JPEG files end to end (jpeg, offsets, labels), or class folders train/ and test/.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2
from training import Experiment, add_arguments, refusing, run

from glcan_fx.demo.images import DataError, images_in, rgb

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights (option A of the paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet-20, -32, ... for images of 32 x 32: depth = 6 n + 2, widths 16, 32, 64."""

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth={depth}: 6 n + 2, such as 20, 32 or 110")
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        widths = [16, 16, 32, 64]
        self.blocks = nn.Sequential(*(
            Block(widths[stage] if first else widths[stage + 1], widths[stage + 1], 2 if first and stage else 1)
            for stage in range(3) for first in [True] + [False] * ((depth - 2) // 6 - 1)))
        self.fc = nn.Linear(64, classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Images(Dataset[Any]):
    """Pixels (N, 3, H, W) uint8 in memory, transformed."""

    def __init__(self, pixels: Tensor, labels: Tensor, transform: v2.Transform) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.pixels[index]), self.labels[index]


def read(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """All images (N, 3, 32, 32) uint8 and labels (N,) of a split."""
    split = "train" if train else "test"
    packed = folder / f"cifar10_{split}.npz"
    if packed.is_file():
        content = np.load(packed)
        files, offsets = content["jpeg"].tobytes(), content["offsets"]
        images = np.stack([np.asarray(Image.open(io.BytesIO(files[a:b]))) for a, b in zip(offsets, offsets[1:])])  # noqa: B905
        labels = content["labels"]
    elif (folder / "cifar-10-batches-py").is_dir():
        data = CIFAR10(folder, train=train)
        images, labels = data.data, np.asarray(data.targets)
    elif (folder / split).is_dir():
        return _class_folders(folder, split)
    else:
        raise SystemExit(f"{folder}: there is neither cifar-10-batches-py, nor {packed.name}, nor a folder {split}/")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


def classes_of(folder: Path) -> list[str]:
    """The classes of a folder of class folders, in alphabetical order: those of both splits, by name."""
    found = {path.name for split in ("train", "test") for path in folder.glob(f"{split}/*")
             if path.is_dir() and not path.name.startswith(".")}
    return sorted(found)


def _class_folders(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pictures of every class in turn, so that the first so many are of all classes."""
    found: list[tuple[int, int, Path]] = []
    empty = []
    for label, name in enumerate(classes_of(folder)):
        files = images_in(folder / split / name)
        empty += [name] * (not files)
        found += [(place, label, path) for place, path in enumerate(files)]
    if not found:
        raise DataError(f"{folder / split}: there are no images in its class folders.")
    if empty:
        print(f"{split}: no images of the class{'es' * (len(empty) > 1)} {', '.join(empty)}", file=sys.stderr)
    images = np.stack([np.asarray(rgb(path).resize((32, 32))) for _, _, path in sorted(found)])
    labels = torch.tensor([label for _, label, _ in sorted(found)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, epochs=15, batch_size=128, lr=0.2)
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet, 6 n + 2 (%(default)s)")
    args = parser.parse_args()
    rescale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    with refusing():
        pixels, labels = (part[:args.limit] for part in read(args.data, train=True))
        held = Images(*read(args.data, train=False), v2.Compose(rescale))
    names = classes_of(args.data)
    classes = len(names) or int(max(labels.max(), held.labels.max())) + 1
    said = f" ({', '.join(names[:8])}{', …' * (len(names) > 8)})" if names else ""
    print(f"{len(labels)} training and {len(held)} held-out images of {classes} classes{said}", file=sys.stderr)

    def evaluate(model: nn.Module, device: torch.device) -> dict[str, float]:
        right = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in DataLoader(held, 500))
        return {"accuracy": 100 * right / len(held)}

    # Padding after the normalisation is the mean colour, not black: a border that only tells where a crop lay.
    augment = v2.Compose([*rescale, v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    experiment = Experiment(
        task="classification", build=lambda: CifarResNet(args.depth, classes), example=(args.batch_size, 3, 32, 32),
        train=Images(pixels, labels, augment), evaluate=evaluate,
        optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4))
    run(experiment, args)


if __name__ == "__main__":
    main()
