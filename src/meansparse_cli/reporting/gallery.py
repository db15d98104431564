"""``gallery.png``: a few examples clean and broken, on both models, with what was changed."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..engine.outcomes import MODELS
from ..engine.witnesses import Found
from .figure import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_ROWS = 6
COLUMNS = ("clean", *(f"{model}: {what}" for model in MODELS for what in ("adversarial", "difference")))


def draw_gallery(found_on: Found, clean: dict[int, Tensor], eps: float, *, title: str, png: Path, svg: Path) -> int:
    """The first examples that were broken on either model; how many are shown.

    ``clean``: index in the data set -> image (channels, height, width) in [0, 1]. A difference is magnified so that
    ``eps`` is black or white, and grey nothing.
    """
    places = {model: {index: i for i, index in enumerate(found.indices.tolist())} for model, found in found_on.items()}
    shown = [index for index in clean if any(index in place for place in places.values())][:N_ROWS]
    if not shown:
        return 0

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(shown), len(COLUMNS), squeeze=False)
        for axes, name in zip(grid[0], COLUMNS, strict=True):
            axes.set_title(name, fontsize=8)
        for row, index in zip(grid, shown, strict=True):
            _show(row[0], clean[index], "")
            for m, model in enumerate(MODELS):
                left, right = row[1 + 2 * m : 3 + 2 * m]
                found, place = found_on.get(model), places.get(model, {}).get(index)
                if found is None or place is None:
                    _show(left, None, "withstood")
                    _show(right, None, "")
                    continue
                image = found.images[place]
                _show(row[0], clean[index], f"example {index}, class {int(found.labels[place])}")
                _show(left, image, found.found_by[place])
                _show(right, (0.5 + (image - clean[index]) / (2 * eps)).clamp(0, 1), "")

    save_figure(draw, (7.2, 1.5 * len(shown) + 0.6), png, svg, title=title, rounded=False)
    return len(shown)


def _show(axes: "Axes", image: Tensor | None, text: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(text, fontsize=6)
    if image is not None:
        pixels = np.squeeze(image.permute(1, 2, 0).numpy())
        axes.imshow(pixels, vmin=0, vmax=1, cmap="gray" if pixels.ndim == 2 else None, interpolation="nearest")
