"""Random starts that depend on nothing but the seed, the attack, the attempt and the example.

One generator an example and attempt, on the CPU: the same start whatever the batch size, the order, the other examples
and the device.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Budget

Start = Callable[[Tensor, torch.Generator, Budget], Tensor]


def example_generator(seed: int, attack: str, attempt: int, index: int) -> torch.Generator:
    """The CPU generator of one example's ``attempt`` (its restart or target) under ``attack``."""
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
