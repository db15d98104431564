"""The judge: whether an image really is misclassified, whatever an attack claims about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .counting import CountedModel


def fresh_logits(model: CountedModel, images: Tensor, *, batch_size: int) -> Tensor:
    """Logits (n, n_classes) of ``images`` (n, channels, height, width) in full float32, on the images' device.

    One forward pass an example: no gradient, no autocast, no TF32, whatever precision the search used. A break that
    exists only in low precision is not one.
    """
    with torch.no_grad(), full_float32(model.device):
        parts = [model(part.to(model.device).contiguous()) for part in torch.split(images, batch_size)]
    if not parts:
        return torch.zeros(0, model.n_classes, device=images.device)
    return torch.cat(parts).to(images.device)


def is_misclassified(model: CountedModel, images: Tensor, y: Tensor, *, batch_size: int) -> Tensor:
    """(n,) bool: the class of highest logit, judged afresh, is not ``y`` (n,)."""
    return fresh_logits(model, images, batch_size=batch_size).argmax(dim=1) != y


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


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast on ``device`` and no TF32, restored on leaving; PyTorch's default lets convolutions use TF32."""
    with float32_set_to("ieee"), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def float32_set_to(products: Literal["ieee", "tf32"]) -> Iterator[None]:
    """How a GPU multiplies float32 numbers, restored on leaving."""
    value: str | bool
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later, where reading the older switch may raise
        switches, value = ((matmul, "fp32_precision"), (cudnn.conv, "fp32_precision")), products
    else:
        switches, value = ((matmul, "allow_tf32"), (cudnn, "allow_tf32")), products == "tf32"
    before = [getattr(owner, name) for owner, name in switches]
    try:
        for owner, name in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), old in zip(switches, before, strict=True):
            setattr(owner, name, old)
