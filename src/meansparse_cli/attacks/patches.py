"""The patches of Square: what a query changes, from draws in [0, 1).

Images are (n, channels, height, width); ``draw`` (n, k): of each row top and left corner (for L2 also those of the
window that gives way, and a turn), then a sign a channel; ``side`` (n,) int64: of each row's patch, in pixels.
"""

import torch
from torch import Tensor

from .budget import l2_norm, per_image


def linf_patch(x: Tensor, best: Tensor, draw: Tensor, side: Tensor, eps: float) -> Tensor:
    """``best`` with one square, of one colour, moved to the budget's edge."""
    inside = _over_channels(_window(x, draw[:, 0], draw[:, 1], side))
    edge = torch.minimum(torch.maximum(best + 2 * eps * signs(draw[:, 2:, None, None]), x - eps), x + eps).clamp(0, 1)
    return torch.where(inside, edge, best)


def l2_patch(x: Tensor, best: Tensor, draw: Tensor, side: Tensor, eps: float) -> Tensor:
    """The mass of one window, and what the budget has left, moved into another in the shape of ``pattern_of``."""
    delta, channels = best - x, x.shape[1]
    window, giving = _window(x, draw[:, 0], draw[:, 1], side), _window(x, draw[:, 2], draw[:, 3], side)
    window_, both = _over_channels(window), _over_channels(window | giving)
    shape = _placed(x, draw, side) * signs(draw[:, 5:, None, None])
    old = delta * window_
    shape = shape + old / (_channel_norm(old) + 1e-12)
    left = (eps**2 - per_image(l2_norm(delta)) ** 2).clamp(min=0) / channels
    mass = (left + _channel_norm(delta * both) ** 2).sqrt()
    shape = shape / (_channel_norm(shape) + 1e-12) * mass
    delta = torch.where(window_, shape, torch.where(both, 0.0, delta))
    return (x + delta / per_image(l2_norm(delta) + 1e-12) * eps).clamp(0, 1)


def _placed(x: Tensor, draw: Tensor, side: Tensor) -> Tensor:
    """(n, 1, height, width): the unit pattern of each row's side, upright or turned, in each row's window."""
    height, width = x.shape[2:]
    out = x.new_zeros(len(x), 1, height, width)
    top, left = _corner(draw[:, 0], height - side), _corner(draw[:, 1], width - side)
    for size in side.unique().tolist():
        rows = (side == size).nonzero().squeeze(1)
        pattern = pattern_of(size).to(x)
        turned = torch.where((draw[rows, 4] > 0.5)[:, None, None], pattern.T, pattern)
        grid = torch.arange(size, device=x.device)
        place = (rows[:, None, None], 0, (top[rows, None] + grid)[:, :, None], (left[rows, None] + grid)[:, None, :])
        out[place] = turned
    return out


def pattern_of(side: int) -> Tensor:
    """(side, side) of unit norm: two bumps of opposite sign, one above the other (the paper's eta)."""
    upper = side // 2
    pattern = torch.cat([_bump(upper, side), -_bump(side - upper, side)])
    return pattern / pattern.norm()


def _bump(height: int, width: int) -> Tensor:
    """(height, width) of unit norm: nested rectangles around the middle, each weighted by one over its rank squared."""
    row, column = torch.arange(height)[:, None], torch.arange(width)[None, :]
    rank = torch.maximum((row - height // 2).abs(), (column - width // 2).abs())  # the first rectangle with the pixel
    n_rectangles = max(height // 2, width // 2) + 1
    weights = torch.tensor([1 / (k + 1) ** 2 for k in range(n_rectangles)])
    bump = weights.flip(0).cumsum(0).flip(0)[rank]
    return bump / bump.norm()


def n_tiles(height: int, width: int) -> int:
    """How many patterns the L2 start of an image has."""
    return (height // (height // 5)) * (width // (height // 5))


def tiled(x: Tensor, start: Tensor, eps: float) -> Tensor:
    """The L2 start: patterns in tiles of a fifth of the height, random signs and turns, scaled to the budget."""
    height, width = x.shape[2:]
    side = height // 5
    border = (height - side * 5) // 2
    pattern, delta = pattern_of(side).to(x), torch.zeros_like(x)
    corners = [(border + i * side, border + j * side) for i in range(height // side) for j in range(width // side)]
    for (top, left), draw in zip(corners, start.unbind(1), strict=True):
        turned = torch.where((draw[:, :1] > 0.5)[:, None, None, :], pattern.T, pattern).reshape(-1, 1, side, side)
        signed = turned * signs(draw[:, 1:, None, None])
        fits = signed[:, :, : max(height - top, 0), : max(width - left, 0)]
        delta[:, :, top : top + fits.shape[2], left : left + fits.shape[3]] = fits
    return (x + delta / per_image(l2_norm(delta) + 1e-12) * eps).clamp(0, 1)


def _window(x: Tensor, draw_top: Tensor, draw_left: Tensor, side: Tensor) -> Tensor:
    """(n, height, width) bool: the window of each row, ``side`` (n,) pixels wide."""
    height, width = x.shape[2:]
    top, left = _corner(draw_top, height - side)[:, None], _corner(draw_left, width - side)[:, None]
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (row >= top) & (row < top + side[:, None])
    inside_columns = (column >= left) & (column < left + side[:, None])
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def _corner(draw: Tensor, room: Tensor) -> Tensor:
    """Uniform in 0 .. room, from a draw in [0, 1)."""
    return torch.minimum((draw * (room + 1)).long(), room)


def _channel_norm(images: Tensor) -> Tensor:
    """(n, channels, height, width) -> (n, channels, 1, 1)."""
    return images.square().sum(dim=(2, 3), keepdim=True).sqrt()


def _over_channels(mask: Tensor) -> Tensor:
    """(n, height, width) -> (n, 1, height, width)."""
    return mask.unsqueeze(1)


def signs(draw: Tensor) -> Tensor:
    """A draw in [0, 1) -> -1 or 1."""
    return torch.where(draw < 0.5, -1.0, 1.0)
