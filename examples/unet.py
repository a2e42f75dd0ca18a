"""A U-Net in forty lines, to try: glcan-fx inspect examples/unet.py --input 8x3x512x512 --task segmentation"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolutions(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Two convolutions with norm and activation; the first has the stride."""
    layers: list[nn.Module] = []
    for channels, step in ((inputs, stride), (outputs, 1)):
        layers += [nn.Conv2d(channels, outputs, 3, step, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Images (N, 3, H, W) to logits (N, classes, H, W); H and W divisible by 2 ** (levels - 1)."""

    def __init__(self, classes: int = 21, width: int = 32, levels: int = 5) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.stem = convolutions(3, width)
        self.encoder = nn.ModuleList(convolutions(a, b, stride=2) for a, b in zip(widths, widths[1:], strict=False))
        self.decoder = nn.ModuleList(convolutions(a + b, a) for a, b in zip(widths, widths[1:], strict=False))
        self.predict = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for down in self.encoder:
            features.append(down(features[-1]))
        y = features.pop()
        for up in reversed(self.decoder):
            skip = features.pop()
            y = up(torch.cat([skip, F.interpolate(y, size=skip.shape[-2:], mode="nearest")], 1))
        return self.predict(y)
