"""Train EDSR (Lim et al. 2017, arXiv 1707.02921) by backpropagation, checkpointing, DGL or GLCAN.

    python examples/train_super_resolution.py --data TRAIN [TRAIN ...] --test Set5 [Set5 ...] --scale 2 --method glcan

Training folders hold images, at any depth (DIV2K_train_HR, T91, BSD200). A test folder holds HR/ and LRx2/ (LRx3/,
LRx4/) with equal names, or high-resolution images only, which are then reduced by Pillow's bicubic filter.

PSNR and SSIM are those of the field: on the luma channel (ITU-R BT.601), without a border of `scale` pixels.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from training import Experiment, add_arguments, refusing, run

from glcan_fx.demo.images import ENDINGS, DataError, images_in, rgb
from glcan_fx.models import edsr


def some_images(folder: Path) -> list[Path]:
    found = images_in(folder)
    if not found:
        raise DataError(f"{folder}: there are no images ({', '.join(ENDINGS)})")
    return found


def reduced(image: Image.Image, scale: int) -> tuple[Image.Image, Image.Image]:
    """The image cut to a multiple of the scale, and its bicubic reduction."""
    width, height = (size - size % scale for size in image.size)
    image = image.crop((0, 0, width, height))
    return image, image.resize((width // scale, height // scale), Image.Resampling.BICUBIC)


class Patches(Dataset[Any]):
    """Random patches (LR, HR), float32 in 0..1, of images held in memory; turned and mirrored at random."""

    def __init__(self, paths: list[Path], scale: int, size: int, each: int) -> None:
        self.scale, self.size, self.each = scale, size, each
        pairs = [reduced(rgb(path), scale) for path in paths]
        small = sum(min(low.size) < size for _, low in pairs)
        if small:
            print(f"{small} of {len(pairs)} training images are smaller than a patch, and skipped", file=sys.stderr)
        self.pairs = [(v2.functional.pil_to_tensor(low), v2.functional.pil_to_tensor(high)) for high, low in pairs
                      if min(low.size) >= size]
        if not self.pairs:
            raise DataError(f"no training image has {size * scale} pixels on both sides: choose a smaller --patch")

    def __len__(self) -> int:
        return len(self.pairs) * self.each

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        low, high = self.pairs[index % len(self.pairs)]
        y, x = (int(torch.randint(side - self.size + 1, ())) for side in low.shape[-2:])
        scale, size = self.scale, self.size
        low = low[:, y:y + size, x:x + size]
        high = high[:, y * scale:(y + size) * scale, x * scale:(x + size) * scale]
        turns, mirrored = int(torch.randint(4, ())), bool(torch.randint(2, ()))
        pair = [torch.rot90(part.flip(-1) if mirrored else part, turns, (1, 2)) for part in (low, high)]
        return pair[0].float() / 255, pair[1].float() / 255


def luma(image: Tensor) -> Tensor:
    """(3, H, W) in 0..1 to luma in 16..235, ITU-R BT.601 as MATLAB's rgb2ycbcr."""
    return 16 + (image * torch.tensor([65.481, 128.553, 24.966])[:, None, None]).sum(0)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of luma, (H, W) in 0..255, in dB."""
    return 10 * math.log10(255**2 / max(float((a - b).square().mean()), 1e-10))


def ssim(a: Tensor, b: Tensor) -> float:
    """Wang et al. 2004: Gaussian window of 11, sigma 1.5, without padding; of luma in 0..255."""
    place = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-place.square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = a.double()[None, None], b.double()[None, None]

    def mean(value: Tensor) -> Tensor:
        return F.conv2d(value, window)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_pairs(folder: Path, scale: int) -> list[tuple[Image.Image, Image.Image]]:
    """High and low resolution of a test set."""
    lows = folder / f"LRx{scale}"
    if not lows.is_dir():
        return [reduced(rgb(path), scale) for path in some_images(folder)]
    found = []
    for path in some_images(lows):
        names = (path.name, f"{path.stem.removesuffix(f'x{scale}')}{path.suffix}")  # 0801x2.png belongs to 0801.png
        high = next((file for name in names if (file := folder / "HR" / name).is_file()), None)
        if high is None:
            raise DataError(f"{folder / 'HR'}: there is no {' or '.join(dict.fromkeys(names))} for {path}")
        found.append(_matched(rgb(high), rgb(path), scale, high))
    return found


def _matched(high: Image.Image, low: Image.Image, scale: int, path: Path) -> tuple[Image.Image, Image.Image]:
    """Both cut to what they have in common; up to a few pixels more are usual."""
    width, height = min(low.width, high.width // scale), min(low.height, high.height // scale)
    if abs(low.width * scale - high.width) > 2 * scale or abs(low.height * scale - high.height) > 2 * scale:
        raise DataError(f"{path} is {high.width} x {high.height}, but its reduced image {low.width} x {low.height}: "
                        f"not a {scale}th of it.")
    if (width * scale, height * scale) != high.size or (width, height) != low.size:
        print(f"{path}: cut to {width * scale} x {height * scale}", file=sys.stderr)
    return high.crop((0, 0, width * scale, height * scale)), low.crop((0, 0, width, height))


def compare(made: Tensor, high: Image.Image, scale: int) -> tuple[float, float]:
    """PSNR and SSIM of an image (3, H, W) in 0..1, rounded to 8 bits as a file would be."""
    made = (made.clamp(0, 1) * 255).round() / 255
    wanted = v2.functional.pil_to_tensor(high).float()[:, :made.shape[1], :made.shape[2]] / 255
    a, b = (luma(part)[scale:-scale, scale:-scale] for part in (made, wanted))
    return psnr(a, b), ssim(a, b)


def bicubic(low: Image.Image, scale: int) -> Tensor:
    """What every method must beat."""
    large = low.resize((low.width * scale, low.height * scale), Image.Resampling.BICUBIC)
    return v2.functional.pil_to_tensor(large).float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, epochs=20, batch_size=16, lr=4e-4, folders=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True, metavar="DIR", help="test sets")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), default=2, help="(%(default)s)")
    parser.add_argument("--patch", type=int, default=32, metavar="PX", help="low-resolution patch (%(default)s)")
    parser.add_argument("--each", type=int, default=8, metavar="N", help="patches of an image an epoch (%(default)s)")
    parser.add_argument("--blocks", type=int, default=16, help="residual blocks (%(default)s)")
    parser.add_argument("--channels", type=int, default=64, help="(%(default)s)")
    args = parser.parse_args()
    with refusing():
        paths = [path for folder in args.data for path in some_images(folder)][:args.limit]
        sets = {folder.name: test_pairs(folder, args.scale) for folder in args.test}
        train = Patches(paths, args.scale, args.patch, args.each)

    def scores(make: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, pairs in sets.items():
            values = [compare(make(low), high, args.scale) for high, low in pairs]
            found |= {f"{kind} {name}": sum(column) / len(values)
                      for kind, column in zip(("PSNR", "SSIM"), zip(*values, strict=True), strict=True)}
        return found

    def evaluate(model: nn.Module, device: torch.device) -> dict[str, float]:
        def enlarged(low: Image.Image) -> Tensor:
            return model(v2.functional.pil_to_tensor(low).to(device)[None].float() / 255)[0].cpu()

        return scores(enlarged)

    reference = scores(lambda low: bicubic(low, args.scale))
    print("bicubic: " + ", ".join(f"{name} {value:.4g}" for name, value in reference.items()))
    experiment = Experiment(
        task="super_resolution", build=lambda: edsr(scale=args.scale, blocks=args.blocks, channels=args.channels),
        example=(args.batch_size, 3, args.patch, args.patch), train=train,
        evaluate=evaluate, optimizer=lambda parameters, lr: torch.optim.Adam(parameters, lr))
    run(experiment, args)


if __name__ == "__main__":
    main()
