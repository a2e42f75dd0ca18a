"""EDSR, single-image super-resolution (Lim et al. 2017, arXiv 1707.02921)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean RGB of the DIV2K training images for values in 0..1, as in the authors' code (EDSR-PyTorch)."""


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class MeanShift(nn.Module):
    """Adds a fixed colour to every pixel of an N x 3 x H x W image; the colour is a buffer, never trained."""

    shift: Tensor

    def __init__(self, shift: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(list(shift)).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class ResidualBlock(nn.Module):
    """``x + residual_scale * conv(relu(conv(x)))``, N x C x H x W to the same shape, without normalization.

    Source: Lim et al. 2017, section 3.1 and figure 2c; the scale is that of section 3.2.
    """

    def __init__(self, channels: int, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv3x3(channels, channels), nn.ReLU(inplace=True), _conv3x3(channels, channels)
        )
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> Tensor:
        residual = self.body(x)
        if self.residual_scale != 1.0:  # a product with 1 would still read and write the whole map
            residual = residual * self.residual_scale
        return x + residual


class EDSR(nn.Module):
    """Single-scale EDSR (Lim et al. 2017, section 3.2, figure 3).

    Takes N x 3 x H x W RGB images with values in 0..``rgb_range`` and returns N x 3 x sH x sW ones, s being
    ``scale``, not clamped to the range. ``head`` is the first convolution, ``body`` the residual blocks and
    a convolution inside the long skip, ``tail`` the up-sampler and the output convolution.

    Args:
        scale: up-sampling factor, 2, 3 or 4.
        blocks: number of residual blocks.
        channels: width of all hidden maps (before the pixel shuffles).
        residual_scale: factor on every residual branch; section 3.2 uses 0.1 for 256 channels.
        rgb_mean: mean colour of the training images for values in 0..1, subtracted first and added last.
        rgb_range: largest value of the images: 1.0 for torchvision's float images; the authors use 255.

    Raises:
        ValueError: unknown scale, or sizes that are not positive.
    """

    def __init__(
        self,
        scale: int,
        blocks: int,
        channels: int,
        residual_scale: float,
        rgb_mean: Sequence[float],
        rgb_range: float,
    ) -> None:
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"scale must be 2, 3 or 4, got {scale!r}")
        if blocks < 1 or channels < 1:
            raise ValueError(f"blocks and channels must be at least 1, got {blocks} and {channels}")
        if len(rgb_mean) != 3:
            raise ValueError(f"rgb_mean must have one value per colour (3), got {len(rgb_mean)}")
        self.scale = scale
        self.sub_mean = MeanShift([-rgb_range * value for value in rgb_mean])
        self.head = _conv3x3(3, channels)
        self.body = nn.Sequential(
            *(ResidualBlock(channels, residual_scale) for _ in range(blocks)), _conv3x3(channels, channels)
        )
        upsampler: list[nn.Module] = []
        for factor in (2, 2) if scale == 4 else (scale,):
            upsampler += [_conv3x3(channels, factor**2 * channels), nn.PixelShuffle(factor)]
        self.tail = nn.Sequential(*upsampler, _conv3x3(channels, 3))
        self.add_mean = MeanShift([rgb_range * value for value in rgb_mean])

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub_mean(x))
        x = x + self.body(x)
        return self.add_mean(self.tail(x))


def edsr(
    scale: int = 2,
    *,
    blocks: int = 16,
    channels: int = 64,
    residual_scale: float = 1.0,
    rgb_mean: Sequence[float] = DIV2K_MEAN,
    rgb_range: float = 1.0,
) -> EDSR:
    """:class:`EDSR`, by default the paper's single-scale baseline: 16 blocks x 64 channels (section 4.2)."""
    return EDSR(scale, blocks, channels, residual_scale, rgb_mean, rgb_range)


def edsr_full(scale: int = 2, **kwargs: Any) -> EDSR:
    """The paper's large :class:`EDSR`: 32 blocks x 256 channels, residual scale 0.1 (section 3.2, table 1).

    ``kwargs`` are further arguments of :func:`edsr` (``rgb_mean``, ``rgb_range``).
    """
    return edsr(scale, **{"blocks": 32, "channels": 256, "residual_scale": 0.1, **kwargs})
