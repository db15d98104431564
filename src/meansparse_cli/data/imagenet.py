"""ImageNet as RobustBench evaluates it: what preprocessing there is, 5,000 fixed validation images, the class numbers.

The list of images and the numbers are read from RobustBench's package, which is not imported for that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to ``size`` x ``size`` pixels: the shorter side to ``resize`` (None: as it is), then the centre.

    ``is_square``: both sides to ``size`` instead, whatever the picture's proportions, and nothing cut off.
    """

    size: int = 224
    resize: int | None = 256
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    is_square: bool = False

    def apply(self, image: Image) -> Image:
        """An RGB image of ``size`` x ``size``; a smaller centre is framed in black, as torchvision does."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import center_crop, resize

        mode = InterpolationMode(self.interpolation)
        if self.is_square:
            return resize(image, [self.size, self.size], interpolation=mode)  # type: ignore[return-value, arg-type]
        if self.resize is not None:
            image = resize(image, self.resize, interpolation=mode)  # type: ignore[assignment, arg-type]
        return center_crop(image, [self.size])  # type: ignore[return-value, arg-type]


ROBUSTBENCH = {
    "Res256Crop224": Preprocessing(interpolation="bilinear"),
    "BicubicRes256Crop224": Preprocessing(),
    "Crop288": Preprocessing(288, resize=None),
    "Res224": Preprocessing(interpolation="bilinear", is_square=True),
}
"""RobustBench's names."""


@cache
def class_numbers() -> dict[str, int]:
    """WordNet id -> class, 0 to 999."""
    numbers: dict[str, int] = json.loads(_helper_file("imagenet_class_to_id_map.json").read_text())
    return numbers


@cache
def evaluation_images() -> tuple[str, ...]:
    """RobustBench's 5,000 validation images, ``WNID/NAME.JPEG``, in its order."""
    return tuple(_helper_file("imagenet_test_image_ids.txt").read_text().split())


def _helper_file(name: str) -> Path:
    spec = find_spec("robustbench")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / "helper_files" / name).is_file():
            return path
    raise DataError(f"robustbench is not installed, or without its {name}", hint="pip install robustbench==1.1.1")
