"""A model that counts the examples passed through it and refuses outputs no attack can work with."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AttackError
from ..operator.active import example_alphas_set, operators_off
from ..operator.insertion import SparsifiedModel


class _ValueAndGradient(torch.autograd.Function):
    """The first argument's values with the second one's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


class CountedModel:
    """Calls ``model`` on (n, channels, height, width) images and returns float32 logits (n, n_classes).

    ``forward_passes`` and ``backward_passes`` count examples, not calls. Raises ``AttackError`` when the output is
    anything but (n, n_classes) finite logits, or has no gradient where one is asked for.

    With ``base_gradient`` the logits are the model's, their gradient in the image is the base model's (every MeanSparse
    operator off), from a second forward pass: a loss is climbed at its true value, along the base model's Jacobian.
    """

    def __init__(self, model: nn.Module, *, n_classes: int, device: torch.device, base_gradient: bool = False) -> None:
        self.model = model
        self.n_classes = n_classes
        self.device = device
        self.base_gradient = base_gradient
        self.forward_passes = 0
        self.backward_passes = 0

    def __call__(self, images: Tensor, alphas: Tensor | None = None) -> Tensor:
        """``alphas`` (n, n_sites): a variant of its own for each image; None: the model as it stands."""
        if alphas is None:
            return self._logits(images)
        with example_alphas_set(cast(SparsifiedModel, self.model), alphas):
            return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        n = images.shape[0]
        if n == 0:  # many networks fail on an empty batch, and pyautoattack's Square can send one
            return images.new_zeros(0, self.n_classes)
        self.forward_passes += n
        if self.base_gradient and images.requires_grad and torch.is_grad_enabled():
            self.forward_passes += n
            with torch.no_grad():
                values = self._checked(self.model(images), n)
            with operators_off(self.model):
                logits: Tensor = _ValueAndGradient.apply(values, self._checked(self.model(images), n))
        else:
            logits = self._checked(self.model(images), n)
        if images.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
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
