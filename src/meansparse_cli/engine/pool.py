"""``meansparse evaluate --pool FILE``: adversarial images from elsewhere, tried on both models as well.

From another alpha, another run, or another person: any file that ``verify`` reads. Nothing in it is believed: an image
that breaks the rules shows nothing, every other one is judged like those of our own attacks.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..attacks.budget import enforce_budget, within_budget
from ..attacks.result import Budget
from .state import Chunk
from .verify import ROUNDING, match_examples, read_images


def read_pool(files: Sequence[Path], split: "Subset[tuple[Tensor, int]]", indices: Tensor) -> dict[str, Chunk]:
    """The images of ``files`` that belong to the examples at ``indices`` (n,), positions in the data set.

    A chunk each set of images, as if an attack had claimed them all: ``positions`` (m,) into ``indices``. ``split`` is the
    whole split that the examples are of. Raises ``DataError`` for a file that ``verify`` would refuse.
    """
    place = {index: position for position, index in enumerate(indices.tolist())}
    pool = {}
    for file in files:
        for found in read_images(file):
            matched = match_examples(found, split, str(file))
            examples = [split.indices[i] for i in matched.evaluated[matched.rows].tolist()]
            here = torch.tensor([example in place for example in examples], dtype=torch.bool)
            positions = torch.tensor([place[example] for example in examples if example in place], dtype=torch.int64)
            name = str(file) if found.name == "images" else f"{file}, {found.name}"
            pool[name] = Chunk(
                positions,
                broken=torch.ones_like(positions, dtype=torch.bool),
                passes=torch.zeros(len(positions), 2, dtype=torch.int64),
                rejected=torch.zeros_like(positions),
                adversarial=matched.images[here],
            )
    return pool


def admissible(chunk: Chunk, x: Tensor, budget: Budget) -> Chunk:
    """The images of a pool that an attacker may use, ``x`` (n, channels, height, width) being the true ones.

    What float32 has carried beyond the budget by a rounding error is moved back.
    """
    assert chunk.adversarial is not None
    true = x[chunk.positions.to(x.device)].cpu()
    allowed = within_budget(chunk.adversarial, true, Budget(budget.norm, budget.eps + ROUNDING[budget.norm]))
    return replace(
        chunk,
        positions=chunk.positions[allowed],
        broken=chunk.broken[allowed],
        passes=chunk.passes[allowed],
        rejected=chunk.rejected[allowed],
        adversarial=enforce_budget(chunk.adversarial[allowed], true[allowed], budget),
    )
