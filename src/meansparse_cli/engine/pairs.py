"""What every (image, alphas) pair of a sweep came to, block of images by block, on disk after each.

A *column* is an alpha for each site. The pairs of one block of images, at all columns asked for, go through each attack as
one stream. Every adversarial image found at one column, the base included, joins the pool of its block and is tried on the
same image at all columns, where it counts only if it breaks. In the end every pair has seen the complete pool of its image,
whichever column was scored first. Measures come out, each (n,) bool, "still classified correctly":

    plain   the column's own plain attacks alone, which the pool never touches; ``apgd-ce``: the first of them, the paper's
    bpda    its own BPDA attacks, and every image of the pool that a BPDA attack found
    worst   everything that was run, the whole pool included
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..attacks import run_attack
from ..attacks.judge import judge
from ..attacks.problem import Problem
from ..data.examples import Examples
from ..operator.insertion import SparsifiedModel
from .evaluation import attack_version
from .pair_blocks import Block, Column, ColumnOutcomes, block_file, column_of, cut_blocks, load_block, save_block
from .state import example_ids

__all__ = ["Column", "Family", "Measure", "PairStore", "column_of"]

Family = Literal["plain", "bpda"]
Measure = Literal["plain", "bpda", "worst", "apgd-ce"]
FAMILIES: tuple[Family, ...] = ("plain", "bpda")
FORMAT = 2  # raise it when the files, or what a pair's outcome means, change


class PairStore:
    """All pairs of n held-out ``examples``, at any column of ``problem.model``, a ``SparsifiedModel``.

    ``plain`` and ``bpda``: the attacks of the two families, cheapest first. ``key`` names what else the outcomes depend on
    (weights, statistics): each key has its own folder under ``folder``, so nothing is lost by changing a setting and
    changing it back. A block is written whole or not at all; killed anywhere, the same calls give the same outcomes.
    """

    def __init__(
        self, problem: Problem, examples: Examples, *,
        plain: Sequence[str], bpda: Sequence[str], folder: Path, key: dict[str, Any], block_size: int = 64,
    ) -> None:  # fmt: skip
        self.problem, self.model = problem, cast(SparsifiedModel, problem.model)
        self.x, self.y, self.indices = examples.x, examples.y.long(), examples.indices.long()
        is_on_cpu = problem.device(self.x.device).type == "cpu"
        if is_on_cpu or problem.precision in ("tf32", "bf16"):  # convolutions are faster so
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.attacks: dict[Family, tuple[str, ...]] = {"plain": tuple(plain), "bpda": tuple(bpda)}
        whole_key = key | {
            "format": FORMAT, "seed": problem.seed, "norm": problem.budget.norm, "eps": problem.budget.eps,
            # in their order: an attack is not shown what one before it broke
            "attacks": [(name, attack_version(name)) for name in (*plain, *bpda)],
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(whole_key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = folder / digest
        self.ids = example_ids(examples.indices, examples.x, examples.y)
        self.blocks = cut_blocks(self.folder, len(examples), block_size)
        self._columns: dict[int, dict[Column, ColumnOutcomes]] = {}
        self.forward_passes = self.backward_passes = 0
        for b in range(len(self.blocks)):
            self._load(b)

    @property
    def base(self) -> Column:
        """Alpha = 0 at every site."""
        return (0.0,) * len(self.model.sites)

    def is_scored(self, b: int, column: Column, family: Family) -> bool:
        """Whether the pairs of block ``b`` at ``column`` have faced the attacks of ``family``."""
        outcomes = self._columns[b].get(column)
        return outcomes is not None and all(name in outcomes.broken for name in self.attacks[family])

    def count_missing(self, b: int, wanted: dict[Family, Sequence[Column]]) -> int:
        """How many (image, column, attack) triples ``score`` would have to see to."""
        n = sum(
            name not in getattr(self._columns[b].get(column), "broken", {})
            for family, columns in wanted.items() for column in columns for name in self.attacks[family]
        )  # fmt: skip
        return n * len(self.blocks[b])

    def classify(self, columns: Sequence[Column]) -> None:
        """One forward pass for each clean image at each column that has not had it."""
        for b in range(len(self.blocks)):
            if any(column not in self._columns[b] for column in columns):
                block = self._load(b)
                self._classify_block(b, block, columns)
                self._save(b, block)

    def score(
        self, b: int, wanted: dict[Family, Sequence[Column]], on_progress: Callable[[int], None] | None = None
    ) -> None:
        """Attack what ``wanted`` names of block ``b`` and has not been attacked; then try the pool on every column."""
        if not self.count_missing(b, wanted):
            return
        block = self._load(b)
        self._classify_block(b, block, list(dict.fromkeys(c for columns in wanted.values() for c in columns)))
        for family in FAMILIES:
            for name in self.attacks[family]:
                todo = [c for c in wanted.get(family, ()) if name not in block.columns[c].broken]
                self._attack(b, block, family, name, todo, on_progress or _no_progress)
            # after the plain attacks it saves BPDA work, after BPDA it completes the picture
            self._try_pool(
                b,
                block,
                [
                    c
                    for c in block.columns
                    if (self.attacks["bpda"] and c in wanted.get("bpda", ())) or self._has_bpda(block, c)
                ],
            )
            self._save(b, block)  # a kill costs one family of attacks on one block

    def clean(self, column: Column, blocks: Sequence[int] | None = None) -> Tensor:
        """(k,) bool: right at the clean image, on the images of ``blocks`` (all of them)."""
        return torch.cat(
            [self._columns[b][column].clean for b in (range(len(self.blocks)) if blocks is None else blocks)]
        )

    def measure(self, column: Column, name: Measure, blocks: Sequence[int] | None = None) -> Tensor:
        """(k,) bool: the measure on the images of ``blocks`` (all of them), up to the first that was not scored."""
        families: dict[Measure, tuple[Family, ...]] = {"worst": FAMILIES, "bpda": ("bpda",)}
        needed = families.get(name, ("plain",))
        parts = [torch.zeros(0, dtype=torch.bool)]
        for b in range(len(self.blocks)) if blocks is None else blocks:
            if not all(self.is_scored(b, column, family) for family in needed):
                break
            outcomes = self._columns[b][column]
            if name == "apgd-ce":
                parts.append(outcomes.clean & ~outcomes.broken["apgd-ce"])
            else:
                parts.append(self._robust(outcomes, needed, with_pool=name != "plain"))
        return torch.cat(parts)

    def _robust(self, outcomes: ColumnOutcomes, families: Sequence[Family], *, with_pool: bool = True) -> Tensor:
        robust = outcomes.clean.clone()
        for family in families:
            for name in self.attacks[family]:
                robust &= ~outcomes.broken.get(name, torch.zeros_like(robust))
            if with_pool:
                robust &= ~outcomes.by_pool[family]
        return robust

    def _classify_block(self, b: int, block: Block, columns: Sequence[Column]) -> None:
        missing = [column for column in dict.fromkeys(columns) if column not in block.columns]
        m = len(self.blocks[b])
        if not missing:
            return
        rows = torch.arange(m).repeat(len(missing))
        images = self._images(b)[rows.to(self.x.device)]
        clean = ~self._misclassified(b, block, rows, images, _alphas(missing, m)).view(-1, m)
        for column, mask in zip(missing, clean, strict=True):
            nothing = torch.zeros(m, dtype=torch.bool)
            block.columns[column] = ColumnOutcomes(mask, {}, {family: nothing.clone() for family in FAMILIES})

    def _attack(
        self, b: int, block: Block, family: Family, name: str, columns: list[Column], on_progress: Callable[[int], None]
    ) -> None:
        """One attack as one stream over the pairs of ``columns`` that its family has left."""
        if not columns:
            return
        # The paper's measure knows no pool; BPDA need not attack what an image of its own pool already breaks.
        left = torch.stack([self._robust(block.columns[c], (family,), with_pool=family == "bpda") for c in columns])
        which, rows = left.nonzero(as_tuple=True)
        on_progress(left.numel() - len(rows))
        pairs = Examples(self.x, self.y, self.indices).at(self.blocks[b][rows])
        result = run_attack(name, self.problem, pairs, torch.tensor(columns)[which], on_progress=on_progress)
        broken, is_broken = torch.zeros_like(left), result.broken.cpu()
        broken[which, rows] = is_broken
        for column, mask in zip(columns, broken, strict=True):
            block.columns[column].broken[name] = mask
        found = rows[is_broken]
        block.pool_rows = torch.cat([block.pool_rows, found])
        block.pool_bpda = torch.cat([block.pool_bpda, torch.full((len(found),), family == "bpda")])
        block.pool_images = torch.cat([block.pool_images, result.adversarial[result.broken].cpu()])
        block.forward_passes += result.forward_passes
        block.backward_passes += result.backward_passes

    def _has_bpda(self, block: Block, column: Column) -> bool:
        names = self.attacks["bpda"]
        return bool(names) and all(name in block.columns[column].broken for name in names)

    def _try_pool(self, b: int, block: Block, columns: list[Column]) -> None:
        """Try on ``columns`` the images of the pool that they have not seen and that could still change an outcome."""
        which, entries = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for i, column in enumerate(columns):
            outcomes = block.columns[column]
            new = torch.arange(outcomes.n_tried, len(block.pool_rows))
            rows, bpda = block.pool_rows[new], block.pool_bpda[new]
            useful = self._robust(outcomes, FAMILIES)[rows] | (bpda & self._robust(outcomes, ("bpda",))[rows])
            entries.append(new[useful])
            which.append(torch.full((int(useful.sum()),), i))
            outcomes.n_tried = len(block.pool_rows)
        which_column, entry = torch.cat(which), torch.cat(entries)
        if not len(entry):
            return
        rows = block.pool_rows[entry]
        images, alphas = block.pool_images[entry].to(self.x.device), torch.tensor(columns)[which_column]
        fooled = self._misclassified(b, block, rows, images, alphas)
        for i, column in enumerate(columns):
            for is_bpda, family in ((False, "plain"), (True, "bpda")):
                hits = fooled & (which_column == i) & (block.pool_bpda[entry] == is_bpda)
                block.columns[column].by_pool[family][rows[hits]] = True

    def _misclassified(self, b: int, block: Block, rows: Tensor, images: Tensor, alphas: Tensor) -> Tensor:
        """(m,) bool on the CPU: ``images`` (m, ...) of the examples at ``rows`` (m,) of block ``b``, each at its alphas."""
        y = self.y[self.blocks[b][rows].to(self.y.device)].to(images.device)
        block.forward_passes += len(images)
        return judge(self.problem, images, y, alphas).cpu()

    def _images(self, b: int) -> Tensor:
        return self.x[self.blocks[b].to(self.x.device)]

    def _load(self, b: int) -> Block:
        file = block_file(self.folder, self.blocks[b])
        block = load_block(file, self.ids[self.blocks[b]], self.x.shape[1:])
        self._columns[b] = block.columns
        return block

    def _save(self, b: int, block: Block) -> None:
        save_block(block_file(self.folder, self.blocks[b]), self.ids[self.blocks[b]], block)

    def passes(self) -> dict[str, int]:
        """Forward and backward passes behind everything here, an image each, earlier sessions included."""
        states = [self._load(b) for b in range(len(self.blocks))]
        return {
            "forward_passes": sum(s.forward_passes for s in states),
            "backward_passes": sum(s.backward_passes for s in states),
        }


def _alphas(columns: Sequence[Column], m: int) -> Tensor:
    return torch.tensor(columns).repeat_interleave(m, dim=0)


def _no_progress(n: int) -> None:
    """Where nobody asked."""
