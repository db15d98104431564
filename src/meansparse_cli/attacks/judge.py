"""The judge: whether an image really is misclassified, whatever an attack claims about it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..operator.device import full_float32
from .counting import CountedModel
from .problem import Problem


def judge(problem: Problem, images: Tensor, y: Tensor, alphas: Tensor | None = None) -> Tensor:
    """(n,) bool, on the device of ``images``: misclassified, by a forward pass each as in ``logits``; ``y`` (n,)."""
    return misclassified(logits(problem, images, alphas), y)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """(n, n_classes), (n,) -> (n,) bool: the class of highest logit is not ``y``."""
    return logits.argmax(dim=1) != y


def logits(problem: Problem, images: Tensor, alphas: Tensor | None = None) -> Tensor:
    """Logits (n, n_classes) of ``images`` (n, channels, height, width) by the model itself, on the images' device.

    ``alphas`` (n, n_sites) gives each image a variant of its own; None: the model as it stands. One forward pass an
    image, in evaluation mode and full float32: no gradient, no autocast, no TF32, whatever precision a search used. A
    break that exists only in low precision is not one. Raises ``AttackError`` for outputs that are not finite logits.
    """
    device, size = problem.device(images.device), problem.batch_size
    counted = CountedModel(problem.model, n_classes=problem.n_classes, device=device)
    parts = [torch.zeros(0, problem.n_classes, device=images.device)]
    with under_attack(problem.model), torch.no_grad(), full_float32(device):
        for i, part in enumerate(images.split(size) if len(images) else ()):
            rows = None if alphas is None else alphas[i * size : (i + 1) * size]
            parts.append(counted(part.to(device).contiguous(), rows).to(images.device))
    return torch.cat(parts)


@contextmanager
def under_attack(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters, restored on leaving.

    Frozen, because an attack wants the gradient of the image: pyautoattack's ``backward`` would fill ``.grad`` of every
    parameter, and pay for it.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, was_training in training:
            module.training = was_training
