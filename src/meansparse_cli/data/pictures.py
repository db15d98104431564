"""From the bytes of a picture to pixels: the one place where picture files are decoded, with one rule for each kind.

Colours are red, green, blue, 8 bits each. Grey is repeated three times, unless the network has one channel. Of 16 bits
65535 is white, an alpha channel is dropped, palettes and CMYK are converted as Pillow does, one bit is black or white.
Orientation tags are not followed, as torchvision's ImageFolder does not. Of an animation the first frame counts.
Floating-point and 32-bit pixels have no known white: they are refused.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from ..foreign import reading

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
GREY_MODES = ("1", "L", "LA", "La")


def decode(content: bytes, name: str, *, channels: int = 3) -> Image:
    """The picture as 8-bit RGB, or grey where ``channels`` is 1; ``name`` begins what a DataError says."""
    from PIL import Image, UnidentifiedImageError

    with reading(DataError, f"{name}: cannot read image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        try:
            opened = Image.open(io.BytesIO(content))
            opened.load()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{name}: too many pixels: {error}", hint="expected pictures of ordinary size") from error
        except UnidentifiedImageError as error:
            raise ValueError("not a picture, whatever its name says") from error
    image = _eight_bits(opened, name)
    if channels != 1:
        return image.convert("RGB")
    if image.mode not in GREY_MODES:
        raise DataError(f"{name}: a colour picture (mode {image.mode}), and the model takes one channel")
    return image.convert("L")


def is_grey(content: bytes, name: str) -> bool:
    """Whether a picture has one colour channel."""
    try:
        decode(content, name, channels=1)
    except DataError:
        return False
    return True


def _eight_bits(image: Image, name: str) -> Image:
    """16 bits scaled to 8; where Pillow reads colours of 16 bits, it has taken their upper 8."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise DataError(f"{name}: {kind} pixels, of which nobody knows what is white", hint="save it with 8 or 16 bits")
    return Image.fromarray(np.round(pixels.astype(np.float64) / 257).astype(np.uint8))
