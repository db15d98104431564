"""Square: black-box random search over square patches (Andriushchenko et al. 2020), every row on its own.

The search of AutoAttack's Square: margin loss, 5000 queries, its schedule of patch sizes. All that an example draws
comes from a generator of its own, so that its result depends on no other example, and a broken one leaves at once.
Unlike pyautoattack's, a patch may touch the last row and column; and a query is not sent where the proposal is the
image that the search is at, whose answer is known (a fact of Linf, where most pixels are at the budget's edge).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import AttackError
from .budget import l2_norm, per_image, project
from .judge import CountedModel, misclassified
from .losses import margin
from .problem import Budget, Problem
from .queue import Batch, Rule, alphas_of

N_QUERIES = 5000
P_INIT = 0.8  # the share of pixels in the first squares; AutoAttack's setting
SMALLEST_L2_IMAGE = 5  # the L2 start is a 5 x 5 tiling
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the share of pixels halves


def side_of(query: int, budget: Budget, height: int, width: int) -> int:
    """The side of the patch at a query: AutoAttack's schedule, which does not depend on the number of queries."""
    share = P_INIT / 2 ** sum(query - 1 > limit for limit in _HALVINGS)
    if budget.norm == "Linf":
        side = max(round(math.sqrt(share * height * width)), 1)
    else:
        side = max(round(math.sqrt(share * height * width)), 3) | 1  # odd
    return min(side, height, width)


class SquareRule(Rule):
    """``n_queries`` (``N_QUERIES``) proposals an example after its start; no gradient, so masking cannot stop it.

    A query a step, number 0 the start. A row has ``best``, the image it is at, and ``loss``, the margin there.
    """

    def __init__(self, problem: Problem, *, n_queries: int | None = None) -> None:
        self.budget, self.is_linf = problem.budget, problem.budget.norm == "Linf"
        self.n_queries = N_QUERIES if n_queries is None else n_queries
        self.sides = torch.zeros(0, dtype=torch.int64)  # of the patch at each query, once the images are seen

    def begin(self, batch: Batch, generators: Iterator[torch.Generator]) -> None:
        """Everything that the rows will ever draw. Raises ``AttackError`` where L2 images have under 5 x 5 pixels."""
        x = batch["x"]
        _, channels, height, width = x.shape
        if not self.is_linf and min(height, width) < SMALLEST_L2_IMAGE:
            raise AttackError(f"Square under L2 needs images of 5 x 5 pixels or more, these are {height} x {width}")
        if not len(self.sides):
            sides = [side_of(query, self.budget, height, width) for query in range(self.n_queries + 1)]
            self.sides = torch.tensor(sides, device=x.device)
        n_tiles = (height // max(height // 5, 1)) * (width // max(height // 5, 1))
        shape = (channels, 1, width) if self.is_linf else (n_tiles, channels + 1)
        starts, draws = [], []
        for own in generators:
            starts.append(torch.rand(shape, generator=own))
            # of each query: a corner (for L2 also that of the window that gives way, and a turn), a sign a channel
            draws.append(torch.rand(len(self.sides), (2 if self.is_linf else 5) + channels, generator=own))
        start = torch.stack(starts).to(x.device)
        eps = self.budget.eps
        batch["start"] = (x + eps * signs(start)).clamp(0, 1) if self.is_linf else tiled(x, start, eps)
        batch["best"] = x.clone()
        batch["loss"] = torch.full((len(x),), -torch.inf, device=x.device)
        batch["draws"] = torch.stack(draws).to(x.device)

    @torch.no_grad()
    def look(self, model: CountedModel, batch: Batch) -> list[bool]:
        """Ask the model about the proposals whose answer is not known; keep what raises the margin."""
        proposal, asked = self._propose(batch)
        which = asked.nonzero().squeeze(1)
        if len(which):
            y, images, best = batch["y"][which], proposal[which].contiguous(), batch["best"]
            logits = model(images, alphas_of(batch, which))
            loss, broken = margin(logits, y, y), misclassified(logits, y)
            better, own_loss = broken | (loss > batch["loss"][which]), batch["loss"][which]
            kept = torch.where(per_image(better), images, best[which]).contiguous()
            batch["best"] = best.index_copy(0, which, kept)
            batch["loss"] = batch["loss"].index_copy(0, which, torch.where(better, loss, own_loss))
            batch["broken"] = batch["broken"].index_copy(0, which, broken)
            batch["forward"] = batch["forward"] + asked
        return (batch["broken"] | (batch["step"] + 1 >= len(self.sides))).tolist()  # type: ignore[no-any-return]

    def found(self, batch: Batch, rows: Tensor) -> Tensor:
        return batch["best"][rows]

    def _propose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The next image of every row, and which of them need an answer."""
        x, best, query = batch["x"], batch["best"], batch["step"]
        draw, side = batch["draws"][torch.arange(len(query), device=query.device), query], self.sides[query]
        patched = (linf_patch if self.is_linf else l2_patch)(x, best, draw, side, self.budget)
        proposal = torch.where(per_image(query == 0), batch["start"], patched)
        return proposal, (query == 0) | (proposal != best).flatten(1).any(dim=1)


# Patches: what a query changes. Images are (n, channels, height, width); ``draw`` (n, k) in [0, 1): of each row top and
# left corner (for L2 also those of the window that gives way, and a turn), then a sign a channel; ``side`` (n,) int64:
# of each row's patch, in pixels.


def linf_patch(x: Tensor, best: Tensor, draw: Tensor, side: Tensor, budget: Budget) -> Tensor:
    """``best`` with one square, of one colour, moved to the budget's edge."""
    inside = _window(x, draw[:, 0], draw[:, 1], side)
    edge = project(best + 2 * budget.eps * signs(draw[:, 2:, None, None]), x, budget)
    return torch.where(inside, edge, best)


def l2_patch(x: Tensor, best: Tensor, draw: Tensor, side: Tensor, budget: Budget) -> Tensor:
    """The mass of one window, and what the budget has left, moved into another in the shape of ``pattern_of``."""
    delta, channels = best - x, x.shape[1]
    window, giving = _window(x, draw[:, 0], draw[:, 1], side), _window(x, draw[:, 2], draw[:, 3], side)
    both = window | giving
    shape = _placed(x, draw, side) * signs(draw[:, 5:, None, None])
    old = delta * window
    shape = shape + old / (_channel_norm(old) + 1e-12)
    left = (budget.eps**2 - per_image(l2_norm(delta)) ** 2).clamp(min=0) / channels
    mass = (left + _channel_norm(delta * both) ** 2).sqrt()
    shape = shape / (_channel_norm(shape) + 1e-12) * mass
    delta = torch.where(window, shape, torch.where(both, 0.0, delta))
    return (x + delta / per_image(l2_norm(delta) + 1e-12) * budget.eps).clamp(0, 1)


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
    """(n, 1, height, width) bool: the window of each row, ``side`` (n,) pixels wide."""
    height, width = x.shape[2:]
    top, left = _corner(draw_top, height - side)[:, None], _corner(draw_left, width - side)[:, None]
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (row >= top) & (row < top + side[:, None])
    inside_columns = (column >= left) & (column < left + side[:, None])
    return inside_rows[:, None, :, None] & inside_columns[:, None, None, :]


def _corner(draw: Tensor, room: Tensor) -> Tensor:
    """Uniform in 0 .. room, from a draw in [0, 1)."""
    return torch.minimum((draw * (room + 1)).long(), room)


def _channel_norm(images: Tensor) -> Tensor:
    """(n, channels, height, width) -> (n, channels, 1, 1)."""
    return images.square().sum(dim=(2, 3), keepdim=True).sqrt()


def signs(draw: Tensor) -> Tensor:
    """A draw in [0, 1) -> -1 or 1."""
    return torch.where(draw < 0.5, -1.0, 1.0)
