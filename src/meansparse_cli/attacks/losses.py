"""The losses that gradient attacks climb; all (n, n_classes) logits -> (n,), larger is closer to a break."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["ce", "dlr", "dlr-targeted", "margin", "margin-targeted", "probability", "probability-targeted"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

N_TARGETS = 9  # AutoAttack's number of target classes


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the true class; ``target`` is not used."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Largest other logit minus the true one: positive when broken. It stands in for DLR where there are 2 classes.

    The loss of Carlini & Wagner (2017, arXiv 1608.04644); on APGD: Ma & Liang (2024, arXiv 2411.15210).
    """
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(dim=1) - _pick(logits, y)


def probability_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Largest other probability minus the true one, in [-1, 1] (PMA: arXiv 2411.15210)."""
    return margin(logits.softmax(dim=1), y, target)


def dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, equation 6): -(z_y - max_other z) / (z_1st - z_3rd)."""
    largest, classes = logits.topk(3, dim=1)
    other = torch.where(classes[:, 0] == y, largest[:, 1], largest[:, 0])
    return -(_pick(logits, y) - other) / (largest[:, 0] - largest[:, 2] + 1e-12)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Target logit minus the true one. It stands in for the targeted DLR where there are fewer than 4 classes."""
    return _pick(logits, target) - _pick(logits, y)


def targeted_probability_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The target's probability minus the true one's, in [-1, 1]."""
    return targeted_margin(logits.softmax(dim=1), y, target)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, equation 7): -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2)."""
    largest = logits.topk(4, dim=1).values
    scale = largest[:, 0] - 0.5 * (largest[:, 2] + largest[:, 3]) + 1e-12
    return -(_pick(logits, y) - _pick(logits, target)) / scale


LOSSES: dict[LossName, Loss] = {
    "ce": cross_entropy,
    "dlr": dlr,
    "dlr-targeted": targeted_dlr,
    "margin": margin,
    "margin-targeted": targeted_margin,
    "probability": probability_margin,
    "probability-targeted": targeted_probability_margin,
}


def choose_loss(name: LossName, n_classes: int) -> Loss:
    """The loss called ``name``, or the margin that stands in for it where there are too few classes."""
    if name == "dlr" and n_classes < 3:
        return margin
    if name == "dlr-targeted" and n_classes < 4:
        return targeted_margin
    return LOSSES[name]


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)
