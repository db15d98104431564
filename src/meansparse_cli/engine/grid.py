"""Many variants on the same images, block of images by block, on disk after each: sweeps and measurements.

The cells of one block, at all variants asked for, go through each attack as one stream. Every adversarial image found
at one variant, the base included, joins the pool of its block and is tried on the same image at all variants, where it
counts only if it breaks. In the end every variant has seen the complete pool of an image, whichever was scored first.
Measures come out, each (n,) bool, "still classified correctly":

    plain   the variant's own plain attacks alone, no pool; ``apgd-ce``: the first of them, the paper's
    bpda    its own BPDA attacks, and every image of the pool that a BPDA attack found
    worst   everything that was run, the whole pool included
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..attacks.problem import Problem
from ..attacks.runner import run_attack
from ..data.examples import Examples
from ..ledger import Decisions, Ledger
from .blocks import Block, VariantOutcomes, cut_blocks, forget_block, load_block, save_block
from .cells import Cells, FoundImages, Variant, variant_of
from .outcomes import attack_version
from .state import example_ids

__all__ = ["Family", "Measure", "Variant", "VariantGrid", "Wanted", "variant_of"]

log = logging.getLogger(__name__)

Family = Literal["plain", "bpda"]
Measure = Literal["plain", "bpda", "worst", "apgd-ce"]
Wanted = Mapping[Family, Sequence[Variant]]
"""The variants to be attacked by each family."""
FAMILIES: tuple[Family, ...] = ("plain", "bpda")
FORMAT = 2  # raise it when the files, or what an outcome means, change


class VariantGrid:
    """All variants of ``problem.model``, a ``SparsifiedModel``, on n held-out ``examples``.

    ``plain`` and ``bpda``: the attacks of the two families, cheapest first. ``key`` names what else the outcomes depend
    on (weights, statistics): each key has its own folder under ``folder``, so nothing is lost by changing a setting and
    changing it back. A block is written whole or not at all; killed anywhere, the same calls give the same outcomes.
    """

    def __init__(
        self,
        problem: Problem,
        examples: Examples,
        *,
        plain: Sequence[str],
        bpda: Sequence[str],
        folder: Path,
        key: Mapping[str, Any],
        block_size: int = 64,
    ) -> None:
        self.cells = Cells(problem, examples)
        is_on_cpu = problem.device(examples.x.device).type == "cpu"
        if is_on_cpu or problem.precision in ("tf32", "bf16"):  # convolutions are faster so
            problem.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.attacks: dict[Family, tuple[str, ...]] = {"plain": tuple(plain), "bpda": tuple(bpda)}
        whole_key = {
            **key,
            "format": FORMAT,
            "seed": problem.seed,
            "norm": problem.budget.norm,
            "eps": problem.budget.eps,
            # in their order: an attack is not shown what one before it broke
            "attacks": [(name, attack_version(name)) for name in (*plain, *bpda)],
        }
        self.ledger = Ledger(folder, whole_key, on_change="beside", note=log.warning)
        self.ids = example_ids(examples)
        self.blocks = cut_blocks(self.ledger.folder, len(examples), block_size)
        self._known: dict[int, dict[Variant, VariantOutcomes]] = {}
        self.on_block: Callable[[str, int], None] = _nobody_asked
        self.on_progress: Callable[[int], None] = _nobody_asked
        for b in range(len(self.blocks)):
            self._load(b)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sites(self) -> Sequence[Any]:
        """The sites that a variant has an alpha for."""
        return self.cells.model.sites

    @property
    def base(self) -> Variant:
        """Alpha = 0 at every site."""
        return (0.0,) * len(self.sites)

    def tell(self, on_block: Callable[[str, int], None], on_progress: Callable[[int], None]) -> None:
        """``on_block``: what begins, with how many (image, variant, attack) triples; ``on_progress``: how many more."""
        self.on_block, self.on_progress = on_block, on_progress

    def decisions(self, kind: str, *key: object) -> Decisions:
        """Decisions of one kind about these images in these blocks; ``key`` names what else they depend on."""
        return self.ledger.decisions(kind, (*key, [len(block) for block in self.blocks], self.ids.tolist()))

    def is_scored(self, b: int, variant: Variant, family: Family) -> bool:
        """True where block ``b`` was attacked at ``variant`` by all attacks of ``family``."""
        outcomes = self._known[b].get(variant)
        return outcomes is not None and all(name in outcomes.broken for name in self.attacks[family])

    def count_missing(self, b: int, wanted: Wanted) -> int:
        """How many (image, variant, attack) triples ``score`` would have to see to."""
        faced = {variant: outcomes.broken for variant, outcomes in self._known[b].items()}
        asked = [(v, name) for family, variants in wanted.items() for v in variants for name in self.attacks[family]]
        return len(self.blocks[b]) * sum(name not in faced.get(variant, {}) for variant, name in asked)

    def classify(self, variants: Sequence[Variant], blocks: Iterable[int] | None = None) -> None:
        """One forward pass for each clean image, of ``blocks`` or of all, at each variant that has not had it."""
        for b in self._each(blocks):
            if any(variant not in self._known[b] for variant in variants):
                block = self._load(b)
                self._classify_block(b, block, variants)
                self._save(b, block)

    def score(self, b: int, wanted: Wanted, what: str = "") -> None:
        """Attack what ``wanted`` names of block ``b`` and has not been attacked; then try the pool on every variant."""
        n_missing, n_variants = self.count_missing(b, wanted), len({v for family in wanted.values() for v in family})
        if not n_missing:
            return
        self.on_block(f"{what}images {int(self.blocks[b][-1]) + 1} of {len(self)}, {n_variants} variants", n_missing)
        block = self._load(b)
        self._classify_block(b, block, [variant for variants in wanted.values() for variant in variants])
        for family in FAMILIES:
            for name in self.attacks[family]:
                todo = [v for v in wanted.get(family, ()) if name not in block.variants[v].broken]
                if todo:
                    self._attack(b, block, family, name, todo)
            # after the plain attacks it saves BPDA work, after BPDA it completes the picture
            if self.attacks["bpda"]:
                asked = wanted.get("bpda", ())
                self._try_pool(b, block, [v for v in block.variants if v in asked or self.is_scored(b, v, "bpda")])
            self._save(b, block)  # a kill costs one family of attacks on one block

    def forget(self, blocks: Iterable[int]) -> None:
        """Throw away what was scored on the images of ``blocks``."""
        for b in blocks:
            forget_block(self.ledger, self.blocks[b])
            self._load(b)

    def clean(self, variant: Variant, blocks: Iterable[int] | None = None) -> Tensor:
        """(k,) bool: correct at the clean image, on the images of ``blocks`` (all of them)."""
        return torch.cat([self._known[b][variant].clean for b in self._each(blocks)])

    def measure(self, variant: Variant, name: Measure, blocks: Iterable[int] | None = None) -> Tensor:
        """(k,) bool: the measure on the images of ``blocks`` (all of them), up to the first that was not scored."""
        families: dict[Measure, tuple[Family, ...]] = {"worst": FAMILIES, "bpda": ("bpda",)}
        needed = families.get(name, ("plain",))
        parts = [torch.zeros(0, dtype=torch.bool)]
        for b in self._each(blocks):
            if not all(self.is_scored(b, variant, family) for family in needed):
                break
            outcomes = self._known[b][variant]
            if name == "apgd-ce":
                parts.append(outcomes.clean & ~outcomes.broken["apgd-ce"])
            else:
                parts.append(self._robust(outcomes, needed, with_pool=name != "plain"))
        return torch.cat(parts)

    def passes(self) -> dict[str, int]:
        """Forward and backward passes behind everything here, an image each, earlier sessions included."""
        blocks = [self._load(b) for b in range(len(self.blocks))]
        return {name: sum(getattr(block, name) for block in blocks) for name in ("forward_passes", "backward_passes")}

    def _each(self, blocks: Iterable[int] | None) -> Iterable[int]:
        return range(len(self.blocks)) if blocks is None else blocks

    def _robust(self, outcomes: VariantOutcomes, families: Sequence[Family], *, with_pool: bool = True) -> Tensor:
        robust = outcomes.clean.clone()
        for family in families:
            for name in self.attacks[family]:
                robust &= ~outcomes.broken.get(name, torch.zeros_like(robust))
            if with_pool:
                robust &= ~outcomes.by_pool[family]
        return robust

    def _classify_block(self, b: int, block: Block, variants: Sequence[Variant]) -> None:
        missing = [variant for variant in dict.fromkeys(variants) if variant not in block.variants]
        m = len(self.blocks[b])
        if not missing:
            return
        alphas = torch.tensor(missing).repeat_interleave(m, dim=0)
        clean = self.cells.correct(self.blocks[b].repeat(len(missing)), alphas).view(-1, m)
        block.forward_passes += clean.numel()
        for variant, mask in zip(missing, clean, strict=True):
            nothing = torch.zeros(m, dtype=torch.bool)
            block.variants[variant] = VariantOutcomes(mask, {}, {family: nothing.clone() for family in FAMILIES})

    def _attack(self, b: int, block: Block, family: Family, name: str, variants: list[Variant]) -> None:
        """One attack as one stream over the cells of ``variants`` that its family has left."""
        # The paper's measure knows no pool; BPDA need not attack what an image of its own pool already breaks.
        of_family = [self._robust(block.variants[v], (family,), with_pool=family == "bpda") for v in variants]
        left = torch.stack(of_family)
        which, rows = left.nonzero(as_tuple=True)
        self.on_progress(left.numel() - len(rows))
        examples, alphas = self.cells.at(self.blocks[b][rows]), torch.tensor(variants)[which]
        result = run_attack(name, self.cells.problem, examples, alphas, on_progress=self.on_progress)
        broken, is_broken = torch.zeros_like(left), result.broken.cpu()
        broken[which, rows] = is_broken
        for variant, mask in zip(variants, broken, strict=True):
            block.variants[variant].broken[name] = mask
        found = FoundImages(rows[is_broken], result.adversarial[result.broken].cpu())
        block.add_to_pool(found, is_bpda=family == "bpda")
        block.forward_passes += result.forward_passes
        block.backward_passes += result.backward_passes + result.n_in_vain

    def _try_pool(self, b: int, block: Block, variants: list[Variant]) -> None:
        """Try on ``variants`` the images of the pool that they have not seen and that could still change an outcome."""
        which, entries = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for i, variant in enumerate(variants):
            outcomes = block.variants[variant]
            new = torch.arange(outcomes.n_tried, len(block.pool_rows))
            rows, bpda = block.pool_rows[new], block.pool_bpda[new]
            useful = self._robust(outcomes, FAMILIES)[rows] | (bpda & self._robust(outcomes, ("bpda",))[rows])
            entries.append(new[useful])
            which.append(torch.full((int(useful.sum()),), i))
            outcomes.n_tried = len(block.pool_rows)
        variant_number, entry = torch.cat(which), torch.cat(entries)
        if not len(entry):
            return
        rows = block.pool_rows[entry]
        found = FoundImages(self.blocks[b][rows], block.pool_images[entry])
        breaks = self.cells.breaks(found, torch.tensor(variants)[variant_number])
        block.forward_passes += len(found)
        for i, variant in enumerate(variants):
            for family in FAMILIES:
                hits = breaks & (variant_number == i) & (block.pool_bpda[entry] == (family == "bpda"))
                block.variants[variant].by_pool[family][rows[hits]] = True

    def _load(self, b: int) -> Block:
        positions = self.blocks[b]
        block = load_block(self.ledger, positions, self.ids[positions], self.cells.examples.x.shape[1:])
        self._known[b] = block.variants
        return block

    def _save(self, b: int, block: Block) -> None:
        save_block(self.ledger, self.blocks[b], self.ids[self.blocks[b]], block)


def _nobody_asked(*told: object) -> None:
    """Takes what is told of progress where nobody listens."""
