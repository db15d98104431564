"""Autograd's word on where the channels are, on layers whose answer is known."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meansparse_cli.models.evidence import channel_evidence

IMAGES = torch.rand(2, 3, 8, 8)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


CONV = nn.Conv2d(3, 5, 3, padding=1)


@pytest.mark.parametrize(
    ("make", "axis", "channels"),
    [
        (lambda x: CONV(x), 1, 5),
        (lambda x: F.relu(CONV(x) + CONV(x)), 1, 5),
        (lambda x: F.max_pool2d(F.silu(CONV(x), inplace=True), 2), 1, 5),
        (lambda x: nn.BatchNorm2d(5).eval()(CONV(x)) * torch.sigmoid(CONV(x).mean((2, 3), keepdim=True)), 1, 5),
        (lambda x: nn.GroupNorm(1, 5)(CONV(x)), 1, 5),
        (lambda x: nn.ConvTranspose2d(3, 8, 2, groups=1)(x), 1, 8),
        (lambda x: CONV(x).permute(0, 2, 3, 1), 3, 5),
        (lambda x: CONV(x).permute(0, -2, -1, -3).permute(0, 3, 1, 2), 1, 5),
        (lambda x: tokens(CONV(x)), 2, 5),
        (lambda x: nn.Linear(3, 7)(tokens(x)), 2, 7),
        (lambda x: nn.Linear(3, 7, bias=False)(x.permute(0, 2, 3, 1)), 3, 7),
        (lambda x: nn.Linear(3, 7)(tokens(x)).transpose(1, 2).reshape(2, 7, 8, 8), 1, 7),
        (lambda x: nn.LayerNorm(3)(tokens(x)) + 1, 2, 3),
        (lambda x: nn.Linear(192, 9)(x.flatten(1)), 1, 9),
    ],
)
def test_the_nearest_layer(make: Callable[[Tensor], Tensor], axis: int, channels: int) -> None:
    found = channel_evidence(make(IMAGES.clone().requires_grad_()))
    assert found is not None
    assert (found.axis, found.channels) == (axis, channels)


@pytest.mark.parametrize(
    "make", [lambda x: x * 2, lambda x: CONV(x).flatten(1), lambda x: CONV(x).reshape(2, 8, 8, 5), lambda x: x.detach()]
)
def test_no_answer_rather_than_a_guess(make: Callable[[Tensor], Tensor]) -> None:
    assert channel_evidence(make(IMAGES.clone().requires_grad_())) is None
