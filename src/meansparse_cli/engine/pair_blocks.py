"""The files of a sweep's pairs: one for each block of images, written whole or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..files import load_torch, save_torch

Column = tuple[float, ...]


@dataclass
class ColumnOutcomes:
    """One column on the m images of a block; every mask is (m,) bool.

    ``broken``: attack -> pairs that it broke, of those that the attacks of its family before it had left. ``by_pool``:
    family -> pairs that an image of the pool broke which this family found. ``n_tried``: entries of the pool tried.
    """

    clean: Tensor
    broken: dict[str, Tensor]
    by_pool: dict[str, Tensor]
    n_tried: int = 0


@dataclass
class Block:
    """The outcomes of one block and its pool: ``pool_rows`` (k,) which image, ``pool_bpda`` (k,) bool, ``pool_images``."""

    columns: dict[Column, ColumnOutcomes]
    pool_rows: Tensor
    pool_bpda: Tensor
    pool_images: Tensor
    forward_passes: int = 0
    backward_passes: int = 0


def column_of(alphas: Sequence[float] | Sequence[str]) -> Column:
    """An alpha for each site, to the nine digits that tell two columns apart."""
    return tuple(float(f"{float(alpha):.9g}") for alpha in alphas)


def cut_blocks(folder: Path, n: int, block_size: int) -> list[Tensor]:
    """Positions of each block of n images: those on disk as they were cut, the rest by ``block_size``."""
    blocks: list[Tensor] = []
    start = 0
    while start < n:
        sizes = [int(file.stem.split("-")[2]) for file in folder.glob(f"block-{start:06d}-*.pt")]
        size = max([s for s in sizes if start + s <= n], default=min(block_size, n - start))
        blocks.append(torch.arange(start, start + size))
        start += size
    return blocks


def block_file(folder: Path, positions: Tensor) -> Path:
    """Where the block of these ``positions`` is kept."""
    return folder / f"block-{int(positions[0]):06d}-{len(positions)}.pt"


def load_block(file: Path, ids: Tensor, image_shape: Sequence[int]) -> Block:
    """The block of the images ``ids`` (m,); an empty one where there is no file, or one of other images."""
    empty = Block({}, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), torch.zeros(0, *image_shape))
    if not file.exists():
        return empty
    state = load_torch(file)
    try:
        if not torch.equal(state.pop("ids"), ids):
            return empty
        columns = {column_of(text.split(",")): ColumnOutcomes(**row) for text, row in state.pop("columns").items()}
        return Block(columns, **state)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} is not a block of a sweep", hint=f"delete it and run again: {file}") from error


def save_block(file: Path, ids: Tensor, block: Block) -> None:
    """Put a block on disk, atomically."""
    columns = {",".join(f"{a:.9g}" for a in column): vars(outcomes) for column, outcomes in block.columns.items()}
    save_torch(file, vars(block) | {"ids": ids, "columns": columns})
