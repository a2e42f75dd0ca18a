"""Train a U-Net, or torchvision's LRASPP, by backpropagation, checkpointing or GLCAN.

    python examples/train_segmentation.py --data CamVid --method glcan

DIR holds train/ and val/ with images, and trainannot/ and valannot/ with masks of the same names (8-bit PNG, a class a
value), as the CamVid of the SegNet tutorial; or JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/, as VOC.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.transforms import v2
from training import Experiment, add_arguments, refusing, run
from unet import UNet

from glcan_fx.demo.images import DataError, image_named, opened, rgb, sizes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORED = 255


class Masks(Dataset[Any]):
    """Images float32 (3, H, W) and masks int64 (H, W), ``IGNORED`` where there is no class; bytes in memory."""

    def __init__(
        self, folder: Path, train: bool, size: tuple[int, int], classes: int, limit: int | None = None
    ) -> None:
        split = "train" if train else "val"
        images, masks = folder / split, folder / f"{split}annot"
        names = sorted(path.stem for path in masks.glob("*.png")) if masks.is_dir() else []
        listed = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        if listed.is_file():
            images, masks, names = folder / "JPEGImages", folder / "SegmentationClass", listed.read_text().split()
        if not names:
            raise DataError(f"{folder}: there is neither {split}annot/ with PNG masks, nor "
                            f"{listed.relative_to(folder)}")
        names = [name for name in names if not name.startswith(".")]
        files = [masks / f"{name}.png" for name in names[:limit]]
        counts = Counter(value for file in files for value in np.unique(values_of(file)).tolist())
        white = set(counts) == {0, 255} and classes == 2
        self.said = [f"{split}: masks of 0 and 255: 255 is taken for class 1"] if white else [
            f"{split}: pixels of the value {value} are ignored, in {count} masks"
            for value, count in sorted(counts.items()) if value >= classes and value != IGNORED]
        if not any(value < classes for value in counts):
            raise DataError(f"{masks}: no pixel of the masks has a class from 0 to {classes - 1}: their values are "
                            f"{', '.join(map(str, sorted(counts)[:9]))}. Pass --classes, or give each class its value.")
        resize = v2.Resize(size, antialias=True)
        self.items = []
        for file in files:
            pixels, values = pair(images, file)
            values = values == 255 if white else np.where(values >= classes, IGNORED, values)
            labels = tv_tensors.Mask(torch.from_numpy(values.astype(np.uint8)))
            self.items.append(resize(tv_tensors.Image(pixels), labels))
        rescale = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(MEAN, STD)]
        augment = [v2.RandomHorizontalFlip(), v2.RandomResizedCrop(size, scale=(0.4, 1.0), antialias=True)]
        self.transform = v2.Compose([*(augment if train else []), *rescale])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.transform(*self.items[index])
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


def values_of(mask: Path) -> np.ndarray[Any, Any]:
    """The values (H, W) of a mask. Raises DataError for one in colours."""
    with opened(mask) as file:
        values = np.array(file)
    if values.ndim == 3 and (values.shape[2] == 2 or (values[..., :1] == values[..., :3]).all()):
        values = values[..., 0]  # grey, with transparency or as a colour
    if values.ndim != 2:
        raise DataError(f"{mask} is in colours: save masks with one value per class, as grey or with a palette.")
    return values


def pair(images: Path, mask: Path) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """The pixels (3, H, W) of the image that a mask belongs to, and the mask's values (H, W). Raises DataError."""
    stem = re.sub(r"[._-]mask$", "", mask.stem)
    path = image_named(images, stem)
    if path is None:
        raise DataError(f"{images}: there is no image for the mask {mask.name}, for example {stem}.jpg")
    values = values_of(mask)
    upright, stored = sizes(path)
    size = values.shape[1], values.shape[0]
    if size not in (upright, stored):
        raise DataError(f"{path} is {upright[0]} x {upright[1]}, its mask {mask.name} {size[0]} x {size[1]}.")
    return v2.functional.pil_to_tensor(rgb(path, upright=size == upright)), values


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, epochs=30, batch_size=8, lr=2e-3)
    parser.add_argument("--model", choices=("unet", "lraspp"), default="unet", help="(%(default)s)")
    parser.add_argument("--classes", type=int, default=11, help="larger mask values are ignored (%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 224), metavar=("H", "W"), help="(160 224)")
    parser.add_argument("--width", type=int, default=16, help="of the U-Net's first level (%(default)s)")
    args = parser.parse_args()
    size = tuple(args.size)
    with refusing():
        held, train = Masks(args.data, False, size, args.classes), Masks(
            args.data, True, size, args.classes, args.limit)
    print(f"{len(train)} training and {len(held)} held-out images", *train.said, *held.said, sep="\n", file=sys.stderr)

    def build() -> nn.Module:
        if args.model == "unet":
            return UNet(args.classes, args.width)
        return lraspp_mobilenet_v3_large(num_classes=args.classes, weights_backbone=None)

    def evaluate(model: nn.Module, device: torch.device) -> dict[str, float]:
        counts = torch.zeros(args.classes, args.classes, dtype=torch.int64)
        for x, y in DataLoader(held, args.batch_size):
            made = model(x.to(device))
            found = (made["out"] if isinstance(made, dict) else made).argmax(1).cpu()
            known = y != IGNORED
            pairs = y[known] * args.classes + found[known]
            counts += torch.bincount(pairs, minlength=args.classes**2).reshape(args.classes, args.classes)
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        present = counts.sum(1) > 0
        return {"mIoU": float((100 * counts.diagonal() / union.clamp(min=1))[present].mean()),
                "pixel accuracy": float(100 * counts.diagonal().sum() / counts.sum())}

    experiment = Experiment(
        task="segmentation", build=build, example=(args.batch_size, 3, *size),
        train=train, evaluate=evaluate,
        optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr, weight_decay=1e-2))
    run(experiment, args)


if __name__ == "__main__":
    main()
