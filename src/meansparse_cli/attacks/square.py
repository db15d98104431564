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
from .budget import per_image
from .judge import CountedModel, misclassified
from .losses import margin
from .patches import l2_patch, linf_patch, n_tiles, signs, tiled
from .problem import Budget, Problem
from .queue import Batch, alphas_of

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


class SquareRule:
    """``n_queries`` (``N_QUERIES``) proposals an example after its start; no gradient, so masking cannot stop it.

    A query a step, number 0 the start. A row has ``best``, the image it is at, and ``loss``, the margin there.
    """

    is_targeted = False

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
        shape = (channels, 1, width) if self.is_linf else (n_tiles(height, width), channels + 1)
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

    def move(self, batch: Batch) -> None:
        """The next proposal is drawn when it is shown."""

    def found(self, batch: Batch, rows: Tensor) -> Tensor:
        return batch["best"][rows]

    def _propose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The next image of every row, and which of them need an answer."""
        x, best, query = batch["x"], batch["best"], batch["step"]
        draw, side = batch["draws"][torch.arange(len(query), device=query.device), query], self.sides[query]
        patched = (linf_patch if self.is_linf else l2_patch)(x, best, draw, side, self.budget.eps)
        proposal = torch.where(per_image(query == 0), batch["start"], patched)
        return proposal, (query == 0) | (proposal != best).flatten(1).any(dim=1)
