"""Distances and projections; every image tensor is (n, channels, height, width) in [0, 1]."""

import torch
from torch import Tensor

from .result import Budget


def per_image(values: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1), to scale images with."""
    return values.view(-1, 1, 1, 1)


def l2_norm(images: Tensor) -> Tensor:
    """(n, channels, height, width) -> (n,); works for any memory format."""
    return images.flatten(1).square().sum(dim=1).sqrt()


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


def project_l2(points: Tensor, x: Tensor, eps: float) -> Tensor:
    """Into the L2 ball of radius ``eps`` around ``x``, then into [0, 1], which keeps a point inside the ball."""
    delta = points - x
    length = l2_norm(delta)
    return (x + delta / per_image(length + 1e-12) * per_image(length.clamp(max=eps))).clamp(0.0, 1.0)


def within_budget(images: Tensor, x: Tensor, budget: Budget) -> Tensor:
    """(m,) bool on the CPU: finite, in [0, 1] and within ``eps`` of ``x``, in float64."""
    flat, delta = images.flatten(1), images.double() - x.double()
    distance = delta.flatten(1).abs().amax(dim=1) if budget.norm == "Linf" else l2_norm(delta)
    in_range = torch.isfinite(flat).all(dim=1) & (flat >= 0).all(dim=1) & (flat <= 1).all(dim=1)
    return (in_range & (distance <= budget.eps * (1 + 1e-9))).cpu()  # the order of a float64 sum may differ


def enforce_budget(points: Tensor, x: Tensor, budget: Budget) -> Tensor:
    """``points`` moved, by rounding errors where an attack kept its word, to inside ``budget`` and [0, 1].

    Exact: norm(returned - x) <= eps holds for the float32 values returned, with no tolerance. A point that is not
    finite is replaced by its clean image.
    """
    finite = per_image(torch.isfinite(points).flatten(1).all(dim=1))
    points = torch.where(finite, points, x).clamp(0.0, 1.0)
    if budget.norm == "Linf":
        lower, upper = _exact_bounds(x, budget.eps)
        return points.clamp(lower, upper)
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


def _exact_bounds(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The lowest and highest float32 pixels within ``eps`` of ``x``: x - eps and x + eps can round outwards."""
    lower, upper = (x.double() - eps).float(), (x.double() + eps).float()
    lower = torch.where(x.double() - lower.double() > eps, torch.nextafter(lower, x), lower)
    upper = torch.where(upper.double() - x.double() > eps, torch.nextafter(upper, x), upper)
    return lower.clamp(min=0.0), upper.clamp(max=1.0)
