"""FAB-T: pyautoattack's Fast Adaptive Boundary attack (Croce & Hein 2020b), kept from its own defects."""

from typing import Any

import torch
from torch import Tensor

from .foreign import contiguous_gradients, isolated_rng
from .losses import N_TARGETS
from .starts import derived_seed
from .task import AttackTask, SearchOutcome

N_STEPS = 100


def fab(task: AttackTask, *, n_steps: int | None = None) -> SearchOutcome:
    """FAB aimed in turn at the ``min(9, n_classes - 1)`` likeliest other classes, from the clean image.

    FAB looks for the nearest adversarial image; one farther than eps is not claimed. It has no random part, so its
    result does not depend on the seed or the batch. ``n_steps`` defaults to ``N_STEPS``.
    """
    from pyautoattack.fab_pt import FABAttack_PT

    n = task.x.shape[0]
    points, claimed = task.x.clone(), torch.zeros(n, dtype=torch.bool, device=task.x.device)

    def predict(images: Tensor) -> Tensor:
        return task.model(contiguous_gradients(images))

    for rows in torch.split(torch.arange(n), task.batch_size):
        x, y = task.x[rows].to(task.model.device), task.y[rows].to(task.model.device)
        attack: Any = FABAttack_PT(
            predict,
            norm=task.budget.norm,
            n_restarts=1,
            n_iter=n_steps or N_STEPS,
            eps=task.budget.eps,
            seed=derived_seed(task.seed, task.attack),
            targeted=True,
            device=task.model.device,
            n_target_classes=min(N_TARGETS, task.model.n_classes - 1),
        )
        with isolated_rng(task.model.device):
            found = attack.perturb(x, y).detach()
        points[rows] = found.to(points.device)
        with torch.no_grad():  # asked of the model: what low precision takes for broken comes back unchanged
            claimed[rows] = (predict(found).argmax(dim=1) != y).to(claimed.device)
        task.advance(len(rows))
    return SearchOutcome(points, claimed)
