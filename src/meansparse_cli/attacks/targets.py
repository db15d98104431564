"""At which other classes a targeted search aims, and in which order."""

import torch
from torch import Tensor

from .budget import finite, l2_norm
from .judge import CountedModel
from .losses import N_TARGETS
from .problem import Norm


def likely_targets(clean_logits: Tensor, n_targets: int = N_TARGETS) -> Tensor:
    """(n, n_classes) -> (n, min(n_targets, n_classes - 1)): the classes after the top one, highest logit first."""
    by_logit = clean_logits.sort(dim=1).indices.flip(1)
    return by_logit[:, 1 : 1 + n_targets]


def nearest_first(
    model: CountedModel, x: Tensor, y: Tensor, targets: Tensor, norm: Norm, alphas: Tensor | None = None
) -> Tensor:
    """``targets`` (n, k) of images ``x`` of classes ``y`` (n,), ordered by how soon the linearised model reaches them.

    The score of MALT (Melamed et al. 2024, arXiv 2407.02240): the gap between two logits over the length of its
    gradient, here in the norm dual to the budget's, to first order the distance to the boundary in ``norm``. A forward
    pass and k backward passes an image. ``alphas`` as for ``CountedModel``.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, alphas)
        gaps = logits.gather(1, y[:, None]) - logits.gather(1, targets)
    lengths = []
    for gap in gaps.unbind(1):
        grad = finite(torch.autograd.grad(gap.sum(), x, retain_graph=True)[0])
        lengths.append(grad.abs().flatten(1).sum(dim=1) if norm == "Linf" else l2_norm(grad))
    distances = gaps.detach() / torch.stack(lengths, dim=1).clamp(min=1e-12)
    return targets.gather(1, distances.argsort(dim=1, stable=True))
