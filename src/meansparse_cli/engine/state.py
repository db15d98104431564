"""The state of an evaluation on disk, so that it can be killed anywhere and go on with the same result.

    <state folder>/settings.json                what every outcome here depends on
    <state folder>/examples.pt                  a digest of each example
    <state folder>/<model>/<attack>/<number>.pt one chunk of examples under one attack, or ``clean``

Chunks are cut in order from the examples that an attack was not tried on yet, so that one that is done again holds the
same examples as before. Each shard is a writer of its own (``ledger``).
"""

import hashlib
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attacks.problem import AttackResult
from ..data.examples import Examples
from ..errors import ArtifactError
from ..ledger import Ledger, is_begun_with, writer_of
from ..settings.shard import Shard, shard_of
from ..settings.values import eps_value
from .cells import FoundImages
from .outcomes import Spent, attack_version

log = logging.getLogger(__name__)

FORMAT = 5  # raise it when what an attack does, or these files, change


@dataclass(frozen=True)
class Chunk:
    """The result of one attack on m examples and one model.

    ``positions`` (m,) int64, ascending; ``broken`` (m,) bool; ``adversarial`` (number broken, channels, height, width)
    float32, the images of the broken examples in their order. ``passes`` (m, 2): forward and backward passes of each.
    ``rejected`` (m,): breaks that the attack claimed and the judge did not confirm.
    """

    positions: Tensor
    broken: Tensor
    passes: Tensor
    rejected: Tensor
    adversarial: Tensor | None = None
    seconds: float = 0.0

    def found(self, asked: Tensor) -> FoundImages:
        """The images of the broken examples among those where ``asked`` (m,) is true."""
        if self.adversarial is None or not len(self.adversarial):
            return FoundImages(self.positions[:0], torch.zeros(0, 1, 1, 1))
        return FoundImages(self.positions[self.broken & asked], self.adversarial[asked[self.broken]])

    def spent(self, wanted: Tensor, confirmed: Tensor) -> Spent:
        """The cost, of which the breaks at ``confirmed`` count; what is not ``wanted`` (n,) has no part in it."""
        counts = wanted[self.positions]
        claimed = self.broken & counts
        forward, backward = self.passes[counts].sum(dim=0).tolist()
        forward_broken, backward_broken = self.passes[claimed].sum(dim=0).tolist()
        return Spent(
            forward_passes=forward,
            backward_passes=backward,
            seconds=self.seconds,
            rejected=int(self.rejected[counts].sum()),
            unconfirmed=int(claimed.sum()) - len(confirmed),
            n_attacked=int(counts.sum()),
            n_attacked_broken=int(claimed.sum()),
            forward_passes_broken=forward_broken,
            backward_passes_broken=backward_broken,
        )


def chunk_of(positions: Tensor, result: AttackResult) -> Chunk:
    """The result of an attack on the examples at ``positions`` (m,); images that broke nothing are dropped."""
    images = result.adversarial.detach()[result.broken].float().cpu()
    return Chunk(positions, result.broken.cpu(), result.passes, result.rejected, images, result.seconds)


@dataclass(frozen=True)
class StateFolder:
    """``path``: where an evaluation is kept; and what it depends on besides the attacks (weights, statistics, a split).

    ``shard``: the examples are those of this shard; without it, what shards have done here is taken over.
    """

    path: Path
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    shard: Shard | None = None


def eps_state_folder(folder: Path, eps: str, grid: Sequence[str]) -> Path:
    """That at ``eps``: one for each eps of a grid, ``folder`` for a single one; either goes on with what it finds."""
    own = folder / f"eps-{eps.replace('/', '_')}"
    if own.exists():
        return own
    return folder if is_begun_with(folder, "eps", eps_value(eps)) or len(grid) == 1 else own


class EvaluationState:
    """The state folder of one evaluation, as the n ``examples`` see it.

    To its caller the positions of a chunk are rows, 0 to n - 1; examples elsewhere are left out. ``key`` as in
    ``Ledger``, whose parts are the attacks. More examples may follow, none may change.
    """

    def __init__(self, folder: StateFolder, key: Mapping[str, Any], attacks: Sequence[str], examples: Examples) -> None:
        n, shard = len(examples), folder.shard
        self.folder, self.writer = folder.path, None if shard is None else shard.name
        self.positions = torch.arange(n) if shard is None else torch.tensor(shard.positions(n * shard.count))
        self.ledger = Ledger(
            folder.path,
            {"format": FORMAT, **key, **folder.fingerprint},
            parts={name: attack_version(name) for name in attacks},
            writer=self.writer,
            mend=self._anew,
            note=log.warning,
        )
        self._check_examples(examples)

    def chunks(self, model: str, attack: str) -> Iterator[tuple[str, Chunk]]:
        """The finished chunks of one attack on one model and their names, one in memory at a time; no example twice."""
        row_of = torch.full((int(self.positions.max()) + 1,), -1, dtype=torch.int64)
        row_of[self.positions] = torch.arange(len(self.positions))
        for name, content in self.ledger.pieces(f"{model}/{attack}"):
            try:
                chunk = Chunk(**content)
            except TypeError as error:
                file = self.folder / model / attack / f"{name}.pt"
                hint = f"delete it, then run again: {shlex.join(['rm', str(file)])}"
                raise ArtifactError(f"{file} is not a chunk of an evaluation", hint=hint) from error
            known = chunk.positions < len(row_of)
            rows = torch.where(known, row_of[chunk.positions.clamp(max=len(row_of) - 1)], -1)
            if (rows >= 0).any():
                yield name, _at_rows(chunk, rows)
            row_of[chunk.positions[known]] = -1  # two shardings may have attacked the same example at the same time

    def append(self, model: str, attack: str, chunk: Chunk) -> str:
        return self.ledger.append(f"{model}/{attack}", vars(replace(chunk, positions=self.positions[chunk.positions])))

    def _check_examples(self, examples: Examples) -> None:
        now = dict(zip(self.positions.tolist(), example_ids(examples).tolist(), strict=True))
        n_known = 0
        for name, state in self.ledger.states("examples"):
            before = dict(zip(state["positions"].tolist(), state["ids"].tolist(), strict=True))
            both = now.keys() & before.keys()
            if differ := sum(now[position] != before[position] for position in both):
                raise ArtifactError(
                    f"{self.folder / name}.pt is of other examples: {differ} of {len(both)} are not the same",
                    hint=f"other images, order or preprocessing? {self._anew(writer_of(name))}",
                )
            if name == f"{self.ledger.prefix}examples":
                n_known = len(before)
        if n_known < len(now):
            self.ledger.put("examples", {"positions": self.positions, "ids": torch.tensor(list(now.values()))})

    def _anew(self, theirs: str | None) -> str:
        """How a user throws away what the writer ``theirs`` wrote; None: the whole evaluation."""
        if theirs == self.writer:
            return "add --fresh to throw it away and start anew, or --name NAME to keep both"
        if theirs is None:
            return f"throw it away (rm -r {self.folder}), or --name NAME to keep both"
        number = shard_of(theirs)
        return (
            f"do that shard anew with the settings of this one (--shard {number} --fresh), or --name NAME to keep both"
        )


def _at_rows(chunk: Chunk, rows: Tensor) -> Chunk:
    """The examples of a chunk whose row is 0 or above, at these rows (m,) in the place of their positions."""
    kept = rows >= 0
    return replace(
        chunk,
        positions=rows[kept],
        broken=chunk.broken[kept],
        passes=chunk.passes[kept],
        rejected=chunk.rejected[kept],
        adversarial=None if chunk.adversarial is None else chunk.adversarial[kept[chunk.broken]],
    )


def example_ids(examples: Examples) -> Tensor:
    """(n,) int64: a digest of each example's index, label and pixels."""
    ids = []
    for index, label, image in zip(examples.indices.tolist(), examples.y.tolist(), examples.x.cpu(), strict=True):
        digest = hashlib.blake2b(f"{index} {label}".encode() + image.numpy().tobytes(), digest_size=8).digest()
        ids.append(int.from_bytes(digest, "big", signed=True))
    return torch.tensor(ids, dtype=torch.int64)
