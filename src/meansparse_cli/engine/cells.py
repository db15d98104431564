"""Everything that is ever attacked or classified is a cell (variant, attack, example) at one budget.

A *variant* is an alpha for each site; the base is the variant of zeros. Which cells are attacked, and in what order, is
for the policies to say: a cascade on two models (``evaluate``), many variants on blocks of images (``grid``). Rows (m,)
int64 are into the n examples; answers are on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..attacks.budget import ROUNDING, enforce_budget, within_budget
from ..attacks.judge import judge
from ..attacks.problem import Problem
from ..data.examples import Examples
from ..operator.insertion import SparsifiedModel

Variant = tuple[float, ...]
"""An alpha for each site, in the order of ``SparsifiedModel.sites``."""


def variant_of(alphas: Sequence[float] | Sequence[str]) -> Variant:
    """An alpha for each site, to the nine digits that tell two variants apart."""
    return tuple(float(f"{float(alpha):.9g}") for alpha in alphas)


@dataclass(frozen=True)
class FoundImages:
    """m images said to be adversarial: ``images`` (m, channels, height, width), of the examples ``rows`` (m,)."""

    rows: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, mask: Tensor) -> "FoundImages":
        """The images where ``mask`` (m,) bool is true."""
        return FoundImages(self.rows[mask], self.images[mask])


class Cells:
    """All cells of n ``examples`` under ``problem``, whose model is a ``SparsifiedModel``.

    ``variants`` is one for all rows, (n_sites,), or one for each, (m, n_sites).
    """

    def __init__(self, problem: Problem, examples: Examples) -> None:
        self.problem, self.examples = problem, Examples(examples.x, examples.y.long(), examples.indices.cpu().long())
        self.model = cast(SparsifiedModel, problem.model)

    def __len__(self) -> int:
        return len(self.examples)

    def blank(self) -> Tensor:
        """(n,) bool, all false."""
        return torch.zeros(len(self), dtype=torch.bool)

    def everywhere(self, alpha: float) -> Tensor:
        """The variant with ``alpha`` at every site, (n_sites,)."""
        return torch.full((len(self.model.sites),), alpha)

    def at(self, rows: Tensor) -> Examples:
        """These examples on the device of the model; the others stay where they are."""
        examples = self.examples.at(rows)
        return examples.to(str(self.problem.device(examples.x.device)))

    def correct(self, rows: Tensor, variants: Tensor) -> Tensor:
        """(m,) bool: classified correctly at the clean image; one forward pass each."""
        examples = self.at(rows)
        return ~judge(self.problem, examples.x, examples.y, variants).cpu()

    def breaks(self, found: FoundImages, variants: Tensor) -> Tensor:
        """(m,) bool: misclassified by the model itself, in float32 and evaluation mode; one forward pass each."""
        y = self.examples.at(found.rows).y
        return judge(self.problem, found.images.to(y.device), y, variants).cpu()

    def inside(self, found: FoundImages) -> FoundImages:
        """The images within the budget, as they are."""
        return found.at(within_budget(found.images, self._clean(found), self.problem.budget))

    def admitted(self, found: FoundImages) -> FoundImages:
        """The images that an attacker may use; what is outside by a rounding error of float32 is moved back."""
        budget = self.problem.budget
        near = found.at(within_budget(found.images, self._clean(found), budget, slack=ROUNDING[budget.norm]))
        return FoundImages(near.rows, enforce_budget(near.images, self._clean(near), budget))

    def _clean(self, found: FoundImages) -> Tensor:
        return self.examples.at(found.rows).x.cpu()
