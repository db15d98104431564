"""The model as it is asked: ``CountedModel`` in a search, ``judge`` for the word that counts, in float32."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AttackError
from ..operator.active import alpha_set, example_alphas_set, operators_off
from ..operator.device import full_float32
from ..operator.fitting import in_batches
from ..operator.function import with_gradient_of
from ..operator.insertion import SparsifiedModel
from .problem import Problem


def judge(problem: Problem, images: Tensor, y: Tensor, alphas: Tensor | None = None) -> Tensor:
    """(n,) bool: misclassified, by a forward pass each as in ``logits``; ``y`` (n,), ``alphas`` of ``variants_set``."""
    with variants_set(problem.model, alphas) as each:
        return misclassified(logits(problem, images, each), y)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """(n, n_classes), (n,) -> (n,) bool: the class of highest logit is not ``y``."""
    return logits.argmax(dim=1) != y


def logits(problem: Problem, images: Tensor, alphas: Tensor | None = None) -> Tensor:
    """Logits (n, n_classes) of ``images`` (n, channels, height, width) by the model itself, on the images' device.

    ``alphas`` (n, n_sites) gives each image a variant of its own; None: the model as it stands. One forward pass an
    image, in evaluation mode and full float32: no gradient, no autocast, no TF32, whatever precision a search used. A
    break that exists only in low precision is not one. Raises ``AttackError`` for outputs that are not finite logits.
    """
    device = problem.device(images.device)
    counted = CountedModel(problem.model, n_classes=problem.n_classes, device=device)

    def of_part(rows: slice) -> Tensor:
        variants = None if alphas is None else alphas[rows]
        return counted(images[rows].to(device).contiguous(), variants).to(images.device)

    with under_attack(problem.model), torch.no_grad(), full_float32(device):
        parts = in_batches(problem.model, len(images), problem.batch_size, of_part)
    return torch.cat([torch.zeros(0, problem.n_classes, device=images.device), *parts])


@contextmanager
def variants_set(model: nn.Module, alphas: Tensor | None) -> Iterator[Tensor | None]:
    """One variant for all images, (n_sites,), for a while; or one for each, (n, n_sites); None: the model as it stands.

    Yields what each forward pass has to be given: None where one for all is set in the model, which then may be any.
    """
    if alphas is None or alphas.ndim == 2:
        yield alphas
    else:
        with alpha_set(model, alphas):
            yield None


@contextmanager
def under_attack(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters, restored on leaving: an attack wants the image's gradient alone."""
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


@dataclass(eq=False)
class CountedModel:
    """Calls ``model`` on (n, channels, height, width) images and returns float32 logits (n, n_classes).

    Passes are counted in examples. Raises ``AttackError`` when the output is anything but (n, n_classes) finite logits,
    or has no gradient where one is asked for.

    With ``base_gradient`` the logits are the model's, their gradient in the image is the base model's (every MeanSparse
    operator off), from a second forward pass: a loss is climbed at its true value, along the base model's Jacobian.
    """

    model: nn.Module
    n_classes: int
    device: torch.device
    base_gradient: bool = False
    forward_passes: int = 0
    backward_passes: int = 0

    def __call__(self, images: Tensor, alphas: Tensor | None = None) -> Tensor:
        """``alphas`` (n, n_sites): a variant of its own for each image; None: the model as it stands."""
        n = images.shape[0]
        self.forward_passes += n
        wants_gradient = images.requires_grad and torch.is_grad_enabled()
        with nullcontext() if alphas is None else example_alphas_set(cast(SparsifiedModel, self.model), alphas):
            if self.base_gradient and wants_gradient:
                self.forward_passes += n
                with torch.no_grad():
                    values = self._checked(self.model(images), n)
                with operators_off(self.model):
                    logits = with_gradient_of(values, self._checked(self.model(images), n))
            else:
                logits = self._checked(self.model(images), n)
        if wants_gradient and not logits.requires_grad:
            raise AttackError(
                "the model's logits have no gradient with respect to the image: it detaches, or runs under no_grad",
                hint="Only the black-box attack can run on it: --attack square.",
            )
        if logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return logits

    def _checked(self, output: Any, n: int) -> Tensor:
        if not isinstance(output, Tensor):
            raise AttackError(
                f"the model returned {type(output).__name__}, expected a tensor of logits ({n}, {self.n_classes})",
                hint="Wrap the model so that it returns its logits alone.",
            )
        if tuple(output.shape) != (n, self.n_classes) or not output.is_floating_point():
            raise AttackError(
                f"the model returned {output.dtype} of shape {tuple(output.shape)} for {n} images, "
                f"expected floating-point logits of shape ({n}, {self.n_classes})",
                hint="Is this the model for this data set?",
            )
        logits = output.float()
        finite = torch.isfinite(logits)
        if not finite.all():
            n_bad = int((~finite).any(dim=1).sum())
            raise AttackError(
                f"the model returned logits that are NaN or infinite for {n_bad} of {n} images",
                hint="Look for NaN in the weights or statistics, or for overflow in half precision.",
            )
        return logits

    def _count_backward(self, grad: Tensor) -> None:
        self.backward_passes += grad.shape[0]
