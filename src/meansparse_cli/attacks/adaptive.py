"""The MeanSparse paper's own adaptive attack (appendix A.4, equation 9): PGD with a penalty on moving masked features.

    max CE(f(x + delta), y) - lambda * sum over sites of || m * (z - z_delta) ||_p^q

z and z_delta: the inputs of a MeanSparse module for x and x + delta; m: one where z lies in the module's band, the same
for every delta. Gradients pass through the true operator. Where no feature is masked, at alpha = 0, or with lambda = 0
it is the PGD of the paper's Table 5, 50 steps of 1/255 (``pgd-50`` has the steps of 0.0078 of its code), so
``adaptive-1-1:0`` is its column of that name.
"""

from functools import partial

import torch
from torch import Tensor

from ..operator.observe import inputs_shown
from .judge import CountedModel
from .losses import cross_entropy
from .pgd import PGDRule
from .problem import Problem
from .queue import Batch

N_STEPS = 50
STEP_SIZE = 1 / 255


class AdaptiveRule(PGDRule):
    """Adaptive-(p,q): sign steps from one uniform random start, as in ``PGDRule`` (the paper names neither).

    ``weight`` is lambda. The paper gives no value; by default the penalty is an average over the features at all sites.
    A clean forward pass more a step: no activation is kept between steps.
    """

    def __init__(
        self, problem: Problem, *, p: float = 1, q: float = 1, weight: float | None = None, n_steps: int = N_STEPS
    ) -> None:
        super().__init__(problem, n_steps=n_steps, step_size=STEP_SIZE if problem.budget.norm == "Linf" else None)
        self.p, self.q, self.weight = p, q, weight

    def look(self, model: CountedModel, batch: Batch) -> list[bool]:
        clean: list[tuple[Tensor, Tensor]] = []
        moved: list[Tensor] = []
        with (
            torch.no_grad(),
            inputs_shown(model.model, lambda operator, z: clean.append((z.clone(), operator.masked(z)))),
        ):
            model(batch["x"], batch.get("alphas"))
        self.loss = partial(self._penalised, clean, moved)
        # a copy: an activation behind the operator may work in place
        with inputs_shown(model.model, lambda operator, z: moved.append(z.clone())):
            left = super().look(model, batch)
        batch["forward"] = batch["forward"] + 1
        return left

    def _penalised(
        self, clean: list[tuple[Tensor, Tensor]], moved: list[Tensor], logits: Tensor, y: Tensor, target: Tensor
    ) -> Tensor:
        """The loss (n,) at what ``moved`` and ``logits`` are of; ``clean``: features and masks at the clean image."""
        loss, n = cross_entropy(logits, y, target), len(y)
        if not clean:
            return loss
        n_features = sum(z.numel() for z in moved) // n
        penalty = torch.zeros(n, device=logits.device)
        for (z, mask), z_delta in zip(clean, moved, strict=True):
            masked = ((z_delta - z) * mask).float().reshape(n, -1).abs()  # windows of one image lie side by side
            sums = masked.pow(self.p).sum(dim=1)
            # a root has no finite gradient at 0, where nothing is masked or has moved
            penalty = penalty + (sums if self.p == self.q else sums.clamp(min=1e-12).pow(self.q / self.p))
        return loss - (1 / n_features if self.weight is None else self.weight) * penalty
