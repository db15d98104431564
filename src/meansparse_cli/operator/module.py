"""``MeanSparse``, the operator of one site: here alpha, in standard deviations, becomes a threshold."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SiteError
from .function import IDENTITY, TRUE_GRADIENT, mean_sparsify
from .shapes import HARD, reshaped

SMALLEST_WEIGHT = 1e-6
"""A channel's weight is divided by where an edge goes back to standard deviations."""


class Operator(nn.Module):
    """Something done at one place of a model, and what can be set of it: ``alpha``, 0 for nothing; a backward ``rule``.

    ``example_alphas`` (n,): an alpha for each image of the next batches. ``is_off``: as alpha 0, whatever alpha is.
    ``example_progress`` (n,): how far the search of each has come, from 0 to 1, for a rule that changes meanwhile.
    """

    alpha: Tensor

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.zeros(()))
        self.rule = TRUE_GRADIENT
        self.is_off = False
        self.example_alphas: Tensor | None = None
        self.example_progress: Tensor | None = None
        self.set_alpha(alpha)

    def set_alpha(self, alpha: float) -> None:
        """Change alpha in place; refuses what is negative or not finite."""
        check_alpha(alpha)
        self.alpha.fill_(alpha)
        self._is_identity = alpha == 0

    @property
    def shared_alpha(self) -> float:
        """Alpha as a number; set as by ``set_alpha``."""
        return float(self.alpha)

    @shared_alpha.setter
    def shared_alpha(self, alpha: float) -> None:
        self.set_alpha(alpha)

    @property
    def _does_nothing(self) -> bool:
        return self.is_off or (self._is_identity and self.example_alphas is None)

    def _rows(self, values: Tensor, n_rows: int, n_axes: int) -> Tensor:
        """(n_rows, 1, ...) of ``n_axes`` axes: the value, (n,) one an image, of each row of the batch axis.

        Windowed transformers fold their windows into it, those of one image side by side.
        """
        if n_rows % len(values):
            raise SiteError(
                f"values for {len(values)} images and a batch axis of {n_rows}: this model's batch axis is not theirs"
            )
        return values.repeat_interleave(n_rows // len(values)).view(-1, *[1] * (n_axes - 1))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_identity = bool(self.alpha == 0)


class MeanSparse(Operator):
    """The operator of one site: ``mean`` and ``std`` (channels,), ``alpha`` in standard deviations.

    ``weight``, above 0, or (channels,) and at least 0, multiplies alpha here and nothing else: the threshold is alpha *
    weight * std, the edge of a soft surrogate gradient stays in stds of the channel. The buffer ``std`` holds weight *
    std. ``shape``: the rule within the threshold, ``hard`` or one of ``shapes.SHAPES``.
    ``channel_axis`` is the axis of its input that the statistics belong to. At alpha = 0 the input itself is returned,
    so that values *and* gradients are those of the base model, also in channels of zero variance.
    """

    mean: Tensor
    std: Tensor
    weight: float | Tensor

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        alpha: float = 0.0,
        channel_axis: int = 1,
        *,
        weight: float | Tensor = 1.0,
        shape: str = HARD,
    ) -> None:
        super().__init__(alpha)
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ConfigError(f"mean and std must be of one shape (channels,), found {mean.shape} and {std.shape}")
        self.register_buffer("mean", mean.detach().to(torch.get_default_dtype()).clone())
        self.register_buffer("std", (std.detach() * weight).to(torch.get_default_dtype()).clone())
        if isinstance(weight, Tensor):
            self.register_buffer("weight", weight.to(self.std.dtype).clamp(min=SMALLEST_WEIGHT), persistent=False)
        else:
            self.weight = weight
        self.channel_axis, self.shape = channel_axis, shape

    def forward(self, x: Tensor) -> Tensor:
        if self._does_nothing:
            return x
        mean, threshold, std = self._at(x)
        edge = None if self.rule.temperature is None else self._edge(self.rule.temperature, std, len(x))
        if self.shape != HARD:
            return reshaped(x, mean, threshold, self.shape, straight_through=self.straight_through, soft_edge=edge)
        return mean_sparsify(x, mean, threshold, straight_through=self.straight_through, soft_edge=edge)

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, threshold and std in the shape that broadcasts against ``x``."""
        if x.shape[self.channel_axis] != len(self.mean):
            found = f"shape {tuple(x.shape)} with its channels on axis {self.channel_axis}"
            raise SiteError(f"an operator of {len(self.mean)} channels in front of an activation of {found}")
        shape = [1] * x.ndim
        shape[self.channel_axis] = -1
        mean, std = self.mean.view(shape), self.std.view(shape)
        return mean, self.threshold(std, len(x)), std

    def threshold(self, std: Tensor, n_rows: int = 1) -> Tensor:
        """alpha * std, in activation units; where each example has its own alpha, one threshold an example and channel.

        Below zero, so that nothing lies within it, where an example's alpha is 0.
        """
        if self.example_alphas is None:
            return self.alpha * std
        rows = self._rows(self.example_alphas, n_rows, std.ndim)
        return torch.where(rows > 0, rows * std, -1.0)

    def _edge(self, width: float, std: Tensor, n_rows: int) -> Tensor:
        """The edge of a soft band in activation units, a number a channel; where it narrows, an example and channel."""
        weight = self.weight.view(std.shape) if isinstance(self.weight, Tensor) else self.weight
        if self.rule.last is None or self.example_progress is None:
            return width / weight * std
        rows = self._rows(self.example_progress, n_rows, std.ndim)
        return width * (self.rule.last / width) ** rows / weight * std

    def masked(self, x: Tensor) -> Tensor:
        """Bool, of the shape of ``x``: what the operator replaces by the mean; nothing at alpha = 0."""
        if self._does_nothing:
            return torch.zeros_like(x, dtype=torch.bool)
        mean, threshold, _ = self._at(x)
        return (x - mean.to(x.dtype)).abs() <= threshold

    @property
    def straight_through(self) -> bool:
        """Does a gradient pass as if the operator were not there?"""
        return self.rule == IDENTITY

    def extra_repr(self) -> str:
        return f"{self.mean.numel()} channels, alpha={float(self.alpha):g}"


def check_alpha(alpha: float) -> None:
    """Refuse an alpha below 0 or not finite."""
    if not 0 <= alpha < float("inf"):
        raise ConfigError(
            f"alpha is {alpha}", hint="alpha is a number of standard deviations, 0 or above; the paper uses 0.05 to 0.5"
        )
