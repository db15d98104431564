"""Where a model is asked: everything that is ever attacked is a cell (variant, attack, example) at one budget.

A *variant* is an alpha for each site; the base is the variant of zeros. What is done with the answers, which cells are
asked about and in what order, is for the policies to say: a cascade on two models (``evaluate``), many variants on
blocks of images (``grid``). Rows (m,) int64 say which of the n examples a question is about; answers are on the CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..attacks import run_attack
from ..attacks.budget import enforce_budget, within_budget
from ..attacks.judge import judge
from ..attacks.problem import Problem
from ..attacks.result import AttackResult, Budget
from ..data.examples import Examples
from ..operator.active import alpha_set
from ..operator.insertion import SparsifiedModel

Variant = tuple[float, ...]
"""An alpha for each site, in the order of ``SparsifiedModel.sites``."""

ROUNDING = {"Linf": 1e-6, "L2": 1e-5}
"""How far x + delta can lie beyond eps in float32, in pixel units of [0, 1] images."""


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
        """Those where ``mask`` (m,) bool is true."""
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

    def right(self, rows: Tensor, variants: Tensor) -> Tensor:
        """(m,) bool: classified correctly at the clean image; one forward pass each."""
        return ~self.breaks(FoundImages(rows, self.examples.at(rows).x), variants)

    def breaks(self, found: FoundImages, variants: Tensor) -> Tensor:
        """(m,) bool: misclassified by the model itself, in float32 and evaluation mode; one forward pass each."""
        y = self.examples.at(found.rows).y
        images = found.images.to(y.device)
        if variants.ndim == 1:  # as any model can be asked, whatever it does to its batch axis
            with alpha_set(self.model, variants):
                return judge(self.problem, images, y).cpu()
        return judge(self.problem, images, y, variants).cpu()

    def attack(
        self, name: str, rows: Tensor, variants: Tensor, on_progress: Callable[[int], None] | None = None
    ) -> AttackResult:
        """One attack; each break that it returns has been judged, and is inside the budget."""
        each = variants.expand(len(rows), -1) if variants.ndim == 1 else variants
        return run_attack(name, self.problem, self.examples.at(rows), each, on_progress=on_progress)

    def inside(self, found: FoundImages) -> FoundImages:
        """Those within the budget, as they are."""
        return found.at(within_budget(found.images, self._clean(found), self.problem.budget))

    def admitted(self, found: FoundImages) -> FoundImages:
        """Those that an attacker may use; what is outside by a rounding error of float32 is moved back."""
        budget = self.problem.budget
        widened = Budget(budget.norm, budget.eps + ROUNDING[budget.norm])
        near = found.at(within_budget(found.images, self._clean(found), widened))
        return FoundImages(near.rows, enforce_budget(near.images, self._clean(near), budget))

    def _clean(self, found: FoundImages) -> Tensor:
        return self.examples.at(found.rows).x.cpu()
