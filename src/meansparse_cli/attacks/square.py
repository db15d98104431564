"""Square: pyautoattack's black-box random search (Andriushchenko et al. 2020), kept from its own defects."""

from typing import Any

import torch
from torch import Tensor

from ..errors import AttackError
from .foreign import isolated_rng
from .starts import derived_seed
from .task import AttackTask, SearchOutcome

N_QUERIES = 5000
P_INIT = 0.8  # the share of pixels in the first squares; AutoAttack's setting
SMALLEST_L2_IMAGE = 5  # the L2 start is a 5 x 5 tiling


def square(task: AttackTask, *, n_queries: int | None = None) -> SearchOutcome:
    """``n_queries`` (``N_QUERIES``) margin queries an example; no gradient, so masking cannot stop it.

    The squares of a batch are drawn together, from a seed made of ``task.seed`` and the indices in the batch: the same
    examples in any order give the same result, another batch size may not. Raises ``AttackError`` for an L2 budget on
    images under 5 pixels high or wide.
    """
    from pyautoattack.square import SquareAttack

    height, width = task.x.shape[2:]
    if task.budget.norm == "L2" and min(height, width) < SMALLEST_L2_IMAGE:
        raise AttackError(f"Square under L2 needs images of 5 x 5 pixels or more, these are {height} x {width}")
    n = task.x.shape[0]
    points, claimed = task.x.clone(), torch.zeros(n, dtype=torch.bool, device=task.x.device)

    def predict(images: Tensor) -> Tensor:
        return task.model(images.contiguous()).clone()  # Square writes into the logits it is given

    for rows in torch.split(task.indices.argsort(stable=True), task.batch_size):
        x, y = task.x[rows].to(task.model.device), task.y[rows].to(task.model.device)
        attack: Any = SquareAttack(
            predict,
            norm=task.budget.norm,
            n_queries=n_queries or N_QUERIES,
            eps=task.budget.eps,
            p_init=P_INIT,
            n_restarts=1,
            seed=derived_seed(task.seed, task.attack, *task.indices[rows].tolist()),
            resc_schedule=False,
            device=task.model.device,
        )
        with torch.no_grad(), isolated_rng(task.model.device):
            found = attack.perturb(x, y).detach()
        points[rows] = found.to(points.device)
        with torch.no_grad():  # asked of the model: what low precision takes for broken comes back unchanged
            claimed[rows] = (predict(found).argmax(dim=1) != y).to(claimed.device)
        task.advance(len(rows))
    return SearchOutcome(points, claimed)
