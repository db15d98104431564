"""A pass over images that several workers share: pieces of whole batches, whose sums are merged in their order.

Which worker makes a piece, how many workers there are and who is first makes no difference, to the last bit. A pass of
one process merges batch by batch instead; the two agree to rounding errors of float64.
"""

from collections.abc import Callable, Sequence
from functools import reduce

from torch import Tensor, nn
from torch.utils.data import Subset

from ..ledger import Ledger
from ..sites.find import Site
from .calibration import PassState, channel_sums
from .statistics import ChannelSums, Estimator, merge

MOST_PIECES = 128
"""Pieces are longer, not more, where there are many batches: each is a file of three numbers a channel."""
KIND = "sums"


def pieces_of(n_images: int, batch_size: int) -> list[range]:
    """The images of each piece, ascending: batches are cut as a pass over all of them cuts them.

    >>> pieces_of(10, 4)
    [range(0, 4), range(4, 8), range(8, 10)]
    """
    size = -(-n_images // (MOST_PIECES * batch_size)) * batch_size
    return [range(start, min(start + size, n_images)) for start in range(0, n_images, size)]


class SharedPass:
    """The pieces of a pass over ``images``, those that anybody has made in ``ledger``."""

    def __init__(self, ledger: Ledger, images: "Subset[tuple[Tensor, int]]", batch_size: int) -> None:
        self.ledger, self.images, self.batch_size = ledger, images, batch_size
        self.pieces = pieces_of(len(images), batch_size)
        self.sums: dict[int, list[ChannelSums]] = {}
        self.read()

    def read(self) -> None:
        """Take up what other workers have made; of a piece that was made twice, the first by the name of its file."""
        for _, content in self.ledger.pieces(KIND):
            self.sums.setdefault(content["piece"], [ChannelSums(**of_site) for of_site in content["sums"]])

    def missing(self, among: Sequence[int] | None = None) -> list[int]:
        """The pieces that nobody has made, ascending; of all, or ``among`` these."""
        return [piece for piece in (range(len(self.pieces)) if among is None else among) if piece not in self.sums]

    def make(
        self,
        piece: int,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        estimator: Estimator,
        n_workers: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        """Put the sums of one piece on disk; killed on the way, it goes on from its last save."""
        state = PassState(
            self.ledger.folder / f"{self.ledger.prefix}pass-{piece}.pt", self.ledger.key | {"piece": piece}
        )
        of_piece = Subset(self.images.dataset, [self.images.indices[i] for i in self.pieces[piece]])
        self.sums[piece] = channel_sums(
            model,
            sites,
            of_piece,
            batch_size=self.batch_size,
            estimator=estimator,
            n_workers=n_workers,
            state=state,
            on_batch=on_batch,
        )
        self.ledger.append(KIND, {"piece": piece, "sums": [vars(of_site) for of_site in self.sums[piece]]})
        state.on_disk.file.unlink(missing_ok=True)

    def merged(self) -> list[ChannelSums]:
        """The sums of each site over all images, once no piece is missing."""
        in_order = [self.sums[piece] for piece in range(len(self.pieces))]
        return [reduce(merge, of_site) for of_site in zip(*in_order, strict=True)]
