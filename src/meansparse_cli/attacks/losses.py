"""The losses that gradient attacks climb; all (n, n_classes) logits -> (n,), larger is closer to a break."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["ce", "dlr", "dlr-targeted"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

N_TARGETS = 9  # AutoAttack's number of target classes


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the true class; ``target`` is not used."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Largest other logit minus the true one: positive when broken. For 2 classes, where DLR is undefined."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(dim=1) - _pick(logits, y)


def dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, equation 6): -(z_y - max_other z) / (z_1st - z_3rd)."""
    largest, classes = logits.topk(3, dim=1)
    other = torch.where(classes[:, 0] == y, largest[:, 1], largest[:, 0])
    return -(_pick(logits, y) - other) / (largest[:, 0] - largest[:, 2] + 1e-12)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Target logit minus the true one. For fewer than 4 classes, where the targeted DLR is undefined."""
    return _pick(logits, target) - _pick(logits, y)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, equation 7): -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2)."""
    largest = logits.topk(4, dim=1).values
    scale = largest[:, 0] - 0.5 * (largest[:, 2] + largest[:, 3]) + 1e-12
    return -(_pick(logits, y) - _pick(logits, target)) / scale


def choose_loss(name: LossName, n_classes: int) -> Loss:
    """The loss called ``name``, or the margin that stands in for it where there are too few classes."""
    if name == "ce":
        return cross_entropy
    if name == "dlr":
        return dlr if n_classes >= 3 else margin
    return targeted_dlr if n_classes >= 4 else targeted_margin


def likely_targets(clean_logits: Tensor, n_targets: int = N_TARGETS) -> Tensor:
    """(n, n_classes) -> (n, min(n_targets, n_classes - 1)): the classes after the top one, highest logit first."""
    by_logit = clean_logits.sort(dim=1).indices.flip(1)
    return by_logit[:, 1 : 1 + n_targets]


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)
