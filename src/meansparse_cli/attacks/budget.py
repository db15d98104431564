"""Distances, projections and random starts; every image tensor is (n, channels, height, width) in [0, 1]."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Budget, Norm

ROUNDING: dict[Norm, float] = {"Linf": 1e-6, "L2": 1e-5}
"""How far float32 can carry x + delta beyond eps, in pixel units of [0, 1] images."""
Start = Callable[[Tensor, torch.Generator, Budget], Tensor]
"""Where an attack on one image begins."""


def per_image(values: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1), to scale images with."""
    return values.view(-1, 1, 1, 1)


def l2_norm(images: Tensor) -> Tensor:
    """(n, channels, height, width) -> (n,); works for any memory format."""
    return images.flatten(1).square().sum(dim=1).sqrt()


def distance(delta: Tensor, norm: Norm) -> Tensor:
    """The size in ``norm`` of each of (n, channels, height, width): (n,)."""
    return delta.flatten(1).abs().amax(dim=1) if norm == "Linf" else l2_norm(delta)


def finite(gradient: Tensor) -> Tensor:
    """Zero where a gradient is NaN or infinite: such a pixel says nothing, and must not end an attack on the others."""
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def unit_l2(images: Tensor) -> Tensor:
    """Each image divided by its L2 norm; an image of zeros stays one. One whose squares underflow is scaled first."""
    length = l2_norm(images)
    faint = length < 1e-9
    if faint.any():
        largest = images.flatten(1).abs().amax(dim=1)
        images = torch.where(per_image(faint & (largest > 0)), images / per_image(largest.clamp(min=1e-37)), images)
        length = l2_norm(images)
    return images / per_image(length + 1e-12)


def steepest(grad: Tensor, norm: Norm) -> Tensor:
    """The direction of length one, in ``norm``, that a gradient says to go."""
    return grad.sign() if norm == "Linf" else unit_l2(grad)


def linf_bounds(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of each pixel, up to rounding."""
    return (x - eps).clamp(min=0.0), (x + eps).clamp(max=1.0)


def project(points: Tensor, x: Tensor, budget: Budget) -> Tensor:
    """Into the ball around ``x``, up to rounding, then into [0, 1], which keeps a point inside the ball."""
    if budget.norm == "Linf":
        return points.clamp(*linf_bounds(x, budget.eps))
    delta = points - x
    length = l2_norm(delta)
    return (x + delta / per_image(length + 1e-12) * per_image(length.clamp(max=budget.eps))).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Compliance:
    """The rules that each of m images keeps, (m,) bool: finite; in [0, 1] and near its clean image, where finite.

    ``distance`` (m,) float64, 0 for an image that is not finite.
    """

    finite: Tensor
    in_range: Tensor
    near: Tensor
    distance: Tensor

    @property
    def allowed(self) -> Tensor:
        return self.finite & self.in_range & self.near


def compliance(images: Tensor, x: Tensor, budget: Budget, *, slack: float = 0.0) -> Compliance:
    """``images`` against the clean ones ``x``, in float64; ``slack``: what eps is widened by."""
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    in_range = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1) | ~finite
    away = distance(torch.where(per_image(finite), images, x).double() - x.double(), budget.norm)
    eps = (budget.eps + slack) * (1 + 1e-9)  # the order of a float64 sum may differ
    return Compliance(finite, in_range, away <= eps, away)


def within_budget(images: Tensor, x: Tensor, budget: Budget, *, slack: float = 0.0) -> Tensor:
    """(m,) bool on the CPU: finite, in [0, 1] and within ``eps`` of ``x``; see ``compliance``."""
    return compliance(images, x, budget, slack=slack).allowed.cpu()


def enforce_budget(points: Tensor, x: Tensor, budget: Budget) -> Tensor:
    """``points`` moved, by rounding errors where an attack kept its word, to inside ``budget`` and [0, 1].

    Exact: norm(returned - x) <= eps holds for the float32 values returned, with no tolerance. A point that is not
    finite is replaced by its clean image.
    """
    finite = per_image(torch.isfinite(points).flatten(1).all(dim=1))
    points = torch.where(finite, points, x).clamp(0.0, 1.0)
    if budget.norm == "Linf":  # the lowest and highest float32 pixels: x - eps and x + eps can round outwards
        lower, upper = (x.double() - budget.eps).float(), (x.double() + budget.eps).float()
        lower = torch.where(x.double() - lower.double() > budget.eps, torch.nextafter(lower, x), lower)
        upper = torch.where(upper.double() - x.double() > budget.eps, torch.nextafter(upper, x), upper)
        return points.clamp(lower.clamp(min=0.0), upper.clamp(max=1.0))
    for shrink in (0.0, 1e-7, 1e-6, 1e-5, 1e-4):  # rounding x + delta can undo a rescaling by less than an ulp
        length = l2_norm(points.double() - x.double())
        outside = length > budget.eps
        if not outside.any():
            return points
        factor = torch.where(outside, budget.eps / length.clamp(min=1e-300) * (1 - shrink), 1.0)
        points = torch.where(
            per_image(outside), (x.double() + (points.double() - x.double()) * per_image(factor)).float(), points
        ).clamp(0.0, 1.0)
    outside = l2_norm(points.double() - x.double()) > budget.eps
    return torch.where(per_image(outside), x, points)


def example_generator(seed: int, attack: str, attempt: int, index: int) -> torch.Generator:
    """For one example's ``attempt`` (its restart or target) under ``attack``.

    On the CPU: the same start whatever the batch size, the order, the other examples and the device.
    """
    text = "\x1f".join(map(str, (seed, attack, attempt, index)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def boundary_start(image: Tensor, generator: torch.Generator, budget: Budget) -> Tensor:
    """APGD's start, as in AutoAttack: a random direction scaled to the budget's boundary, clipped to [0, 1].

    ``image`` (channels, height, width). Linf: uniform noise divided by its largest entry; L2: a uniform direction.
    """
    if budget.norm == "Linf":
        noise = 2 * torch.rand(image.shape, generator=generator) - 1
        size = noise.abs().max()
    else:
        noise = torch.randn(image.shape, generator=generator)
        size = noise.square().sum().sqrt()
    noise = noise.to(image.device)
    return (image + budget.eps * (noise / (size.to(image.device) + 1e-12))).clamp(0.0, 1.0)


def uniform_start(image: Tensor, generator: torch.Generator, budget: Budget) -> Tensor:
    """PGD's start: uniform in the budget's ball, clipped to [0, 1]. ``image`` (channels, height, width)."""
    if budget.norm == "Linf":
        noise = 2 * torch.rand(image.shape, generator=generator) - 1
    else:
        noise = torch.randn(image.shape, generator=generator)
        radius = torch.rand((), generator=generator).pow(1 / image.numel())
        noise = noise * (radius / (noise.square().sum().sqrt() + 1e-12))
    return (image + budget.eps * noise.to(image.device)).clamp(0.0, 1.0)
