"""The MeanSparse paper's own adaptive attack (appendix A.4, equation 9): PGD with a penalty on moving masked features.

    max CE(f(x + delta), y) - lambda * sum over sites of || m * (z - z_delta) ||_p^q

z and z_delta: the inputs of a MeanSparse module for x and x + delta; m: one where z lies in the module's band, the same
for every delta. Gradients pass through the true operator. Where no feature is masked, at alpha = 0, or with lambda = 0
it is the PGD of the paper's Table 5, 50 steps of 1/255 (``pgd-50`` has the steps of 0.0078 of its code), so
``adaptive-1-1:0`` is its column of that name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..operator.module import MeanSparse
from .counting import CountedModel
from .pgd import PGDRule
from .queue import Batch, search
from .result import Budget
from .task import AttackTask, SearchOutcome

N_STEPS = 50
STEP_SIZE = 1 / 255


def adaptive(task: AttackTask, *, p: float = 1, q: float = 1, weight: float | None = None) -> SearchOutcome:
    """Adaptive-(p,q): sign steps from one uniform random start, as in ``pgd`` (the paper names neither).

    ``weight`` is lambda. The paper gives no value; by default it is one over the number of features at all sites, which
    makes the penalty an average over features. A clean forward pass more a step: no activation is kept between steps.
    """
    step_size = STEP_SIZE if task.problem.budget.norm == "Linf" else None
    rule = AdaptiveRule(task.problem.budget, n_steps=N_STEPS, step_size=step_size, p=p, q=q, weight=weight)
    return search(task, rule, targets=task.examples.y[:, None])


class AdaptiveRule(PGDRule):
    """PGD on cross-entropy minus the penalty."""

    def __init__(
        self, budget: Budget, *, n_steps: int, step_size: float | None, p: float, q: float, weight: float | None
    ) -> None:
        super().__init__(budget, n_steps=n_steps, step_size=step_size)
        self.p, self.q, self.weight = p, q, weight

    def evaluate(self, model: CountedModel, batch: Batch, point: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at ``point`` (n, channels, height, width), and the loss (n,)."""
        clean: list[tuple[Tensor, Tensor]] = []
        moved: list[Tensor] = []
        with torch.no_grad(), _inputs(model.model, lambda operator, z: clean.append((z, operator.masked(z)))):
            model(batch["x"], batch.get("alphas"))
        with _inputs(model.model, lambda operator, z: moved.append(z)):
            logits = model(point, batch.get("alphas"))
        loss = self.loss(logits, batch["y"], batch["target"])
        if not clean:
            return logits, loss
        n = len(point)
        n_features = sum(z.numel() for z in moved) // n
        penalty = torch.zeros(n, device=logits.device)
        for (z, mask), z_delta in zip(clean, moved, strict=True):
            masked = ((z_delta - z) * mask).float().reshape(n, -1).abs()  # windows of one image lie side by side
            sums = masked.pow(self.p).sum(dim=1)
            # a root has no finite gradient at 0, where nothing is masked or has moved
            penalty = penalty + (sums if self.p == self.q else sums.clamp(min=1e-12).pow(self.q / self.p))
        return logits, loss - (1 / n_features if self.weight is None else self.weight) * penalty


@contextmanager
def _inputs(model: nn.Module, note: Callable[[MeanSparse, Tensor], Any]) -> Iterator[None]:
    """Calls ``note`` with every operator and its input, in the order of the forward pass."""

    def hook(operator: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(operator, MeanSparse)
        note(operator, args[0].clone())  # an activation behind it may work in place

    operators = [module for module in model.modules() if isinstance(module, MeanSparse)]
    handles = [operator.register_forward_pre_hook(hook) for operator in operators]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
