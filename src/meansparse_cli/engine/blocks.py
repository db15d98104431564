"""The outcomes of many variants on one block of images, and the pool of images found there: a state of a ledger."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..ledger import Ledger
from .cells import FoundImages, Variant, variant_of


@dataclass
class VariantOutcomes:
    """One variant on the m images of a block; every mask is (m,) bool.

    ``broken``: attack -> images that it broke, of those that the attacks of its family before it had left. ``by_pool``:
    family -> images that an image of the pool broke which this family found. ``n_tried``: entries of the pool tried.
    """

    clean: Tensor
    broken: dict[str, Tensor]
    by_pool: dict[str, Tensor]
    n_tried: int = 0


@dataclass
class Block:
    """``pool_rows`` (k,): which image of the block an entry of the pool is of; ``pool_bpda`` (k,): found by BPDA."""

    pool_rows: Tensor
    pool_bpda: Tensor
    pool_images: Tensor
    variants: dict[Variant, VariantOutcomes] = field(default_factory=dict)
    forward_passes: int = 0
    backward_passes: int = 0

    @staticmethod
    def empty(image_shape: Sequence[int]) -> "Block":
        """Nothing known yet of images (channels, height, width)."""
        return Block(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), torch.zeros(0, *image_shape))

    def add_to_pool(self, found: FoundImages, *, is_bpda: bool) -> None:
        self.pool_rows = torch.cat([self.pool_rows, found.rows])
        self.pool_bpda = torch.cat([self.pool_bpda, torch.full((len(found),), is_bpda)])
        self.pool_images = torch.cat([self.pool_images, found.images])


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


def load_block(ledger: Ledger, positions: Tensor, ids: Tensor, image_shape: Sequence[int]) -> Block:
    """The block of the images ``ids`` (m,); an empty one where there is none, or one of other images."""
    name = _name(positions)
    state = ledger.get(name)
    try:
        if state is None or not torch.equal(state.pop("ids"), ids):
            return Block.empty(image_shape)
        rows = state.pop("columns").items()
        return Block(**state, variants={variant_of(text.split(",")): VariantOutcomes(**row) for text, row in rows})
    except (KeyError, TypeError, AttributeError) as error:
        file = ledger.folder / f"{name}.pt"
        raise ArtifactError(f"{file} is not a block of a sweep", hint=f"delete it and run again: {file}") from error


def forget_block(ledger: Ledger, positions: Tensor) -> None:
    (ledger.folder / f"{_name(positions)}.pt").unlink(missing_ok=True)


def save_block(ledger: Ledger, positions: Tensor, ids: Tensor, block: Block) -> None:
    state = vars(block) | {"ids": ids}
    variants = state.pop("variants").items()
    columns = {",".join(f"{alpha:.9g}" for alpha in variant): vars(outcomes) for variant, outcomes in variants}
    ledger.put(_name(positions), state | {"columns": columns})


def _name(positions: Tensor) -> str:
    return f"block-{int(positions[0]):06d}-{len(positions)}"
