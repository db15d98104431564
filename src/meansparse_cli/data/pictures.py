"""The one place where a picture file becomes pixels.

The rule is Pillow's ``convert("RGB")``, which torchvision's ``ImageFolder`` follows: of an animation the first frame,
alpha dropped, a palette's colours, CMYK without a profile, 1 bit as black and white, and the pixels as they lie in the
file (EXIF orientation is not applied). But 16-bit grey is scaled so that 65535 is 1.0, which Pillow would clip (of
16-bit colour Pillow keeps the high byte of each value); 32-bit whole numbers are taken as 16-bit where they fit, and
floating point as it is where it lies in [0, 1].
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from .imagenet import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def decode_picture(content: bytes, preprocessing: Preprocessing | None = None, *, is_grey: bool = False) -> np.ndarray:
    """A file's pixels, float32 (3, height, width) in [0, 1]; ``is_grey``: (1, height, width).

    Raises ValueError with what is wrong, whatever the file holds.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(content))
            image.load()
        deep = _grey_levels(image)
    except Exception as error:  # Pillow's decoders raise what they like on a broken file
        words = "its format is none that is known here" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(str(words) or type(error).__name__) from error
    if deep is None or preprocessing is not None:
        if deep is not None:
            image = Image.fromarray((deep * 255).round().astype(np.uint8))
        image = image.convert("RGB")
        pixels = np.asarray(image if preprocessing is None else preprocessing.apply(image))
        pixels = pixels.astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    else:
        pixels = np.repeat(deep[None].astype(np.float32), 3, axis=0)
    if not is_grey:
        return pixels
    if (pixels != pixels[:1]).any():
        raise ValueError("it is in colour, and the model takes grey pictures of one channel")
    return pixels[:1]


def _grey_levels(image: Image) -> np.ndarray | None:
    """(height, width) in [0, 1] of a grey picture deeper than 8 bits; None for any other."""
    if not image.mode.startswith(("I", "F")):
        return None
    levels = np.asarray(image).astype(np.float64)
    limit = 1 if image.mode == "F" else 65535
    low, high = levels.min(), levels.max()
    if not 0 <= low <= high <= limit:
        raise ValueError(f"its values (mode {image.mode}) go from {low:g} to {high:g}, expected 0 to {limit}")
    return levels / limit
