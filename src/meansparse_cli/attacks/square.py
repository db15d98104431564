"""Square: black-box random search over square patches (Andriushchenko et al. 2020), every row on its own.

The search of AutoAttack's Square: margin loss, 5000 queries, its schedule of patch sizes. All that an example draws
comes from a generator of its own, so that its result depends on no other example, and a broken one leaves at once.
Unlike pyautoattack's, a patch may touch the last row and column; and a query is not sent where the proposal is the image
that the search is at, whose answer is known (a fact of Linf, where most pixels are at the budget's edge).
"""

import math
from collections import deque

import torch
from torch import Tensor

from ..errors import AttackError
from .budget import l2_norm, per_image
from .losses import margin
from .starts import example_generator
from .task import AttackTask, SearchOutcome

N_QUERIES = 5000
P_INIT = 0.8  # the share of pixels in the first squares; AutoAttack's setting
SMALLEST_L2_IMAGE = 5  # the L2 start is a 5 x 5 tiling
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the share of pixels halves

Rows = dict[str, Tensor]


def square(task: AttackTask, *, n_queries: int | None = None) -> SearchOutcome:
    """``n_queries`` (``N_QUERIES``) proposals an example after its start; no gradient, so masking cannot stop it.

    Raises ``AttackError`` for an L2 budget on images under 5 pixels high or wide.
    """
    height, width = task.examples.x.shape[2:]
    if task.problem.budget.norm == "L2" and min(height, width) < SMALLEST_L2_IMAGE:
        raise AttackError(f"Square under L2 needs images of 5 x 5 pixels or more, these are {height} x {width}")
    n, n_queries = len(task.examples.x), N_QUERIES if n_queries is None else n_queries
    sizes = torch.tensor([_side(query, task) for query in range(n_queries + 1)], device=task.model.device)
    points, claimed = task.examples.x.clone(), torch.zeros(n, dtype=torch.bool, device=task.examples.x.device)
    passes = torch.zeros(n, 2, dtype=torch.int64)
    waiting, active = deque(range(n)), torch.zeros(0, dtype=torch.int64)
    rows: Rows = {}
    with torch.no_grad():
        while waiting or len(active):
            if waiting and len(active) < task.problem.batch_size:
                admitted = [waiting.popleft() for _ in range(min(task.problem.batch_size - len(active), len(waiting)))]
                fresh = _admit(task, admitted, n_queries)
                rows = {key: torch.cat([rows[key], fresh[key]]) for key in fresh} if len(active) else fresh
                active = torch.cat([active, torch.tensor(admitted)])
            proposal, asked = _propose(task, rows, sizes)
            _answer(task, rows, proposal, asked)
            leaving = rows["broken"] | (rows["query"] >= n_queries)
            left = leaving.cpu()
            if left.any():
                gone = active[left].to(points.device)
                points[gone] = rows["best"][leaving].to(points.device)
                claimed[gone] = rows["broken"][leaving].to(points.device)
                passes[active[left], 0] = rows["n_asked"][leaving].cpu()
                task.advance(int(left.sum()))
                rows, active = {key: value[~leaving] for key, value in rows.items()}, active[~left]
            if rows:
                rows["query"] = rows["query"] + 1
    return SearchOutcome(points, claimed, passes)


def _side(query: int, task: AttackTask) -> int:
    """The side of the patch at a query: AutoAttack's schedule, which does not depend on the number of queries."""
    height, width = task.examples.x.shape[2:]
    share = P_INIT / 2 ** sum(query - 1 > limit for limit in _HALVINGS)
    if task.problem.budget.norm == "Linf":
        side = max(round(math.sqrt(share * height * width)), 1)
    else:
        side = max(round(math.sqrt(share * height * width)), 3) | 1  # odd
    return min(side, height, width)


def _admit(task: AttackTask, examples: list[int], n_queries: int) -> Rows:
    """Rows of new examples: everything they will ever draw, and query 0, the start, as their first proposal."""
    device, (channels, _, width) = task.model.device, task.examples.x.shape[1:]
    linf = task.problem.budget.norm == "Linf"
    n_tiles = 1 if linf else _n_tiles(task)
    starts, draws = [], []
    for example in examples:
        generator = example_generator(task.problem.seed, task.attack, 0, int(task.examples.indices[example]))
        shape = (channels, 1, width) if linf else (n_tiles, channels + 1)
        starts.append(torch.rand(shape, generator=generator))
        # of each query: top and left corner (for L2 also of the window that gives way, and a turn), a sign a channel
        draws.append(torch.rand(n_queries + 1, (2 if linf else 5) + channels, generator=generator))
    there = torch.tensor(examples, device=task.examples.x.device)
    x = task.examples.x[there].to(device)
    start = torch.stack(starts).to(device)
    zeros = torch.zeros(len(examples), dtype=torch.int64, device=device)
    alphas = {} if task.alphas is None else {"alphas": task.alphas[there.to(task.alphas.device)].to(device)}
    return alphas | {
        "x": x,
        "y": task.examples.y[there].to(device),
        "start": (x + task.problem.budget.eps * _sign(start)).clamp(0, 1) if linf else _tiled(task, x, start),
        "best": x.clone(),
        "loss": torch.full((len(x),), -torch.inf, device=device),  # the margin of ``best``
        "broken": zeros.bool(),
        "query": zeros,
        "n_asked": zeros,
        "draws": torch.stack(draws).to(device),
    }


def _propose(task: AttackTask, rows: Rows, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The next image of every row, and which of them need an answer."""
    query = rows["query"]
    draw, side = rows["draws"][torch.arange(len(query), device=query.device), query], sizes[query]
    propose = _linf_patch if task.problem.budget.norm == "Linf" else _l2_patch
    proposal = torch.where(per_image(query == 0), rows["start"], propose(task, rows["x"], rows["best"], draw, side))
    return proposal, (query == 0) | (proposal != rows["best"]).flatten(1).any(dim=1)


def _answer(task: AttackTask, rows: Rows, proposal: Tensor, asked: Tensor) -> None:
    """Ask the model about the rows of ``proposal`` where ``asked``; keep what raises the margin."""
    which = asked.nonzero().squeeze(1)
    if not len(which):
        return
    y, images = rows["y"][which], proposal[which]
    logits = task.model(images.contiguous(), rows["alphas"][which] if "alphas" in rows else None)
    loss, broken = margin(logits, y, y), logits.argmax(dim=1) != y
    better = broken | (loss > rows["loss"][which])
    rows["best"] = rows["best"].index_copy(
        0, which, torch.where(per_image(better), images, rows["best"][which]).contiguous()
    )
    rows["loss"] = rows["loss"].index_copy(0, which, torch.where(better, loss, rows["loss"][which]))
    rows["broken"] = rows["broken"].index_copy(0, which, broken)
    rows["n_asked"] = rows["n_asked"] + asked


def _linf_patch(task: AttackTask, x: Tensor, best: Tensor, draw: Tensor, side: Tensor) -> Tensor:
    """``best`` with one square, of one colour, moved to the budget's edge."""
    inside = _over_channels(_window(x, draw[:, 0], draw[:, 1], side))
    eps = task.problem.budget.eps
    edge = torch.minimum(torch.maximum(best + 2 * eps * _sign(draw[:, 2:, None, None]), x - eps), x + eps).clamp(0, 1)
    return torch.where(inside, edge, best)


def _l2_patch(task: AttackTask, x: Tensor, best: Tensor, draw: Tensor, side: Tensor) -> Tensor:
    """The mass of one window, and what the budget has left, moved into another in the shape of ``_pattern``."""
    delta, channels, eps = best - x, x.shape[1], task.problem.budget.eps
    window, giving = _window(x, draw[:, 0], draw[:, 1], side), _window(x, draw[:, 2], draw[:, 3], side)
    window_, both = _over_channels(window), _over_channels(window | giving)
    shape = _placed(x, draw, side) * _sign(draw[:, 5:, None, None])
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
        pattern = _pattern(size).to(x)
        turned = torch.where((draw[rows, 4] > 0.5)[:, None, None], pattern.T, pattern)
        grid = torch.arange(size, device=x.device)
        place = (rows[:, None, None], 0, (top[rows, None] + grid)[:, :, None], (left[rows, None] + grid)[:, None, :])
        out[place] = turned
    return out


def _pattern(side: int) -> Tensor:
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


def _n_tiles(task: AttackTask) -> int:
    height, width = task.examples.x.shape[2:]
    return (height // (height // 5)) * (width // (height // 5))


def _tiled(task: AttackTask, x: Tensor, start: Tensor) -> Tensor:
    """The L2 start: patterns in tiles of a fifth of the height, random signs and turns, scaled to the budget."""
    height, width = x.shape[2:]
    side = height // 5
    border = (height - side * 5) // 2
    pattern, delta = _pattern(side).to(x), torch.zeros_like(x)
    corners = [(border + i * side, border + j * side) for i in range(height // side) for j in range(width // side)]
    for (top, left), draw in zip(corners, start.unbind(1), strict=True):
        turned = torch.where((draw[:, :1] > 0.5)[:, None, None, :], pattern.T, pattern).reshape(-1, 1, side, side)
        signed = turned * _sign(draw[:, 1:, None, None])
        fits = signed[:, :, : max(height - top, 0), : max(width - left, 0)]
        delta[:, :, top : top + fits.shape[2], left : left + fits.shape[3]] = fits
    return (x + delta / per_image(l2_norm(delta) + 1e-12) * task.problem.budget.eps).clamp(0, 1)


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


def _sign(draw: Tensor) -> Tensor:
    """A draw in [0, 1) -> -1 or 1."""
    return torch.where(draw < 0.5, -1.0, 1.0)
