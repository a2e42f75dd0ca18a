"""Images as people have them, read as upright RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from glcan_fx.errors import GlcanFxError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")


class DataError(GlcanFxError):
    """Something about data, or the demo's options, that the user can put right."""


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder and of those inside it, sorted; hidden files are none."""
    return sorted(path for path in folder.rglob("*")
                  if path.suffix.lower() in ENDINGS and not path.name.startswith("."))


def image_named(folder: Path, stem: str) -> Path | None:
    """The image file of this name, whatever its ending."""
    return next((path for ending in ENDINGS if (path := folder / f"{stem}{ending}").is_file()), None)


def opened(path: Path) -> Image.Image:
    """An image file, whose pixels are not read yet. Raises DataError where it is none."""
    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} has more pixels than Pillow reads: {error}. If you trust it, set PIL.Image."
                        "MAX_IMAGE_PIXELS, or make it smaller.") from error
    except (UnidentifiedImageError, OSError) as error:
        what = "is empty" if path.is_file() and path.stat().st_size == 0 else f"is not a readable image: {error}"
        raise DataError(f"cannot read image {path}: it {what}. Replace it, or remove its entry.") from error


def sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of an image upright, as its EXIF orientation says, and as its pixels are stored."""
    with opened(path) as file:
        width, height = file.size
        try:
            turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # may be behind the pixels
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot read image {path}: {error}. Replace it, or remove its entry.") from error
    return ((height, width) if turned else (width, height)), (width, height)


def rgb(path: Path, *, upright: bool = True) -> Image.Image:
    """An image as 8-bit RGB: upright, 16 bits a channel scaled to 8, palettes, grey, CMYK and transparency converted.
    Raises DataError where it cannot be read."""
    with opened(path) as file:
        try:
            image: Any = ImageOps.exif_transpose(file) if upright else file.copy()
            if image.mode.startswith("I") or image.mode == "F":
                image = _of_more_bits(np.asarray(image))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            made: Image.Image = image.convert("RGB")
            return made
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot read image {path}: {error}. Replace it, or remove its entry.") from error


def _of_more_bits(values: np.ndarray[Any, Any]) -> Image.Image:
    """Grey values of 16 bits, of 8 in a wider type, or of 0 to 1, as 8 bits."""
    most = float(values.max(initial=0))
    scale = 255.0 if most <= 1 and values.dtype.kind == "f" else 1.0 if most <= 255 else 255 / 65535
    return Image.fromarray(np.clip(np.rint(values.astype(np.float64) * scale), 0, 255).astype(np.uint8))
