"""More than one shared alpha: an alpha for each stage of the network, or for each site, by coordinate search.

The paper finds that depth matters (Table 10: the early sites help most, under attacks that the operator masks).
Starting from the best shared alpha, one group of sites after the other, the late ones first, is tried at a few alphas
with all other groups as they are. So that the search does not fit the examples it looks at, the held-out blocks fall
into three parts. Two of them take turns, step by step: a candidate must be ahead on one and be confirmed, ahead
again, on the other, which took no part in choosing it. The third no step looks at: on it the result is judged. The
clean constraint holds on all of them at every step. What the result is worth is for the test split to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor

from ..engine.grid import Family, Variant, VariantGrid, variant_of
from ..errors import ConfigError
from ..sites.find import Site
from ..stats.paired import paired_difference
from .choice import ChoiceRule, Curve

N_CANDIDATES = 3  # alphas above 0 that each group is tried at
N_PARTS = 4  # depths of a network without stages
N_ROTATED = 3  # parts of the held-out blocks
MIN_UNSEEN = 40  # images; fewer cannot tell a gain from luck


@dataclass(frozen=True)
class Step:
    """One group of sites: the best other alpha on one part of the blocks, and whether the other part confirmed it."""

    group: str
    alpha_before: float
    alpha_tried: float
    gain: float
    confirmed_gain: float | None
    is_accepted: bool


@dataclass(frozen=True)
class Found:
    """An alpha for each site, and how it was found."""

    variant: Variant
    steps: list[Step] = field(default_factory=list)

    def to_report(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "site_alphas": {site.name: alpha for site, alpha in zip(sites, self.variant, strict=True)},
            "steps": [vars(step) for step in self.steps],
        }


def depth_groups(sites: Sequence[Site]) -> dict[str, list[int]]:
    """Sites by stage: neighbours whose inputs have one resolution. Four equal parts where that never changes."""
    groups: list[list[int]] = []
    before: tuple[int, ...] | None = None
    for i, site in enumerate(sites):
        axis = site.channel_axis if site.channel_axis < 0 else site.channel_axis - 1  # the shape has no batch axis
        resolution = tuple(size for k, size in enumerate(site.shape) if k != axis % len(site.shape))
        if resolution != before:
            groups.append([])
        groups[-1].append(i)
        before = resolution
    if len(groups) == 1:
        n, k = len(sites), min(N_PARTS, len(sites))
        groups = [list(range(n * part // k, n * (part + 1) // k)) for part in range(k)]
    return {f"{sites[g[0]].name} to {sites[g[-1]].name}": g for g in groups}


def site_groups(sites: Sequence[Site]) -> dict[str, list[int]]:
    return {site.name: [i] for i, site in enumerate(sites)}


def candidates_of(alphas: Sequence[float], n: int = N_CANDIDATES) -> list[float]:
    """0 and at most ``n`` alphas of the grid, evenly spaced, the largest among them.

    >>> candidates_of([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 3)
    [0.0, 0.2, 0.4, 0.6]
    """
    above = [alpha for alpha in alphas if alpha > 0]
    n = min(n, len(above))
    return [0.0, *[above[(i + 1) * len(above) // n - 1] for i in range(n)]]


def search_alphas(
    grid: VariantGrid, groups: dict[str, list[int]], *, start: Variant, candidates: Sequence[float], rule: ChoiceRule
) -> Found:
    """Coordinate search over ``groups`` from ``start``, one pass. Resumes from what ``grid`` has on disk.

    Call ``check_blocks`` before the work that leads here.
    """
    search = _Search(grid, candidates, rule)
    decisions = grid.decisions("search", groups, start, list(candidates), rule)
    current, steps = variant_of(start), []
    for t, (name, group) in enumerate(reversed(groups.items())):
        what = f"step {t + 1} of {len(groups)}: {name}"
        proposal = decisions.once(what, partial(search.propose, current, group, t % 2, what))
        if proposal is None:
            continue
        best, confirmed = _moved(current, group, proposal["alpha"]), None
        if proposal["gain"] > 0:
            what += ", confirming"
            confirmed = decisions.once(what, partial(search.gain, best, current, (t + 1) % 2, what))
        accepted = confirmed is not None and confirmed > 0
        steps.append(Step(name, current[group[0]], proposal["alpha"], proposal["gain"], confirmed, accepted))
        current = best if accepted else current
    return Found(current, steps)


class _Search:
    """What the steps of a search ask of a grid; ``part`` (0 or 1): which third of its blocks is looked at."""

    def __init__(self, grid: VariantGrid, candidates: Sequence[float], rule: ChoiceRule) -> None:
        self.grid, self.candidates, self.rule = grid, candidates, rule
        of_curve: dict[Curve, tuple[Family, ...]] = {"worst": ("plain", "bpda"), "bpda": ("bpda",)}
        self.families = of_curve.get(rule.curve, ("plain",))
        grid.classify([grid.base])
        self.lowest = self._clean(grid.base) - rule.max_clean_drop - 1e-12

    def propose(self, current: Variant, group: list[int], part: int, what: str) -> dict[str, float] | None:
        """The best other alpha and its gain; None where every other alpha costs too much clean accuracy."""
        others = {_moved(current, group, alpha): alpha for alpha in self.candidates}
        others.pop(current, None)
        self.grid.classify(list(others))
        others = {variant: alpha for variant, alpha in others.items() if self._clean(variant) >= self.lowest}
        if not others:
            return None
        correct = self._scored([current, *others], part, what)
        best = max(others, key=lambda variant: (int(correct[variant].sum()), -others[variant]))
        return {"alpha": others[best], "gain": paired_difference(correct[best], correct[current]).difference}

    def gain(self, best: Variant, current: Variant, part: int, what: str) -> float:
        correct = self._scored([current, best], part, what)
        return paired_difference(correct[best], correct[current]).difference

    def _scored(self, variants: Sequence[Variant], part: int, what: str) -> dict[Variant, Tensor]:
        """The outcomes of the rule's curve on one part, once they are there."""
        blocks = range(part, len(self.grid.blocks), N_ROTATED)
        for b in blocks:
            self.grid.score(b, dict.fromkeys(self.families, list(variants)), f"{what}, ")
        return {variant: self.grid.measure(variant, self.rule.curve, blocks) for variant in variants}

    def _clean(self, variant: Variant) -> float:
        return float(self.grid.clean(variant).double().mean())


def check_blocks(n: int, block_size: int) -> None:
    """Refuse a search that leaves unseen too few of ``n`` images in blocks of ``block_size``."""
    if (found := n_unseen(n, block_size)) < MIN_UNSEEN:
        enough = next(more for more in count(n) if n_unseen(more, block_size) >= MIN_UNSEEN)
        smaller = next((size for size in (32, 16, 8) if size < block_size and n_unseen(n, size) >= MIN_UNSEEN), None)
        raise ConfigError(
            f"a search judges on every third block of held-out images: {found} images of {n} in blocks of "
            f"{block_size}, {MIN_UNSEEN} are needed",
            hint=f"raise --n-examples to {enough}" + (f", or give --block-size {smaller} --fresh" if smaller else ""),
        )


def n_unseen(n: int, block_size: int) -> int:
    """How many of ``n`` images lie in the blocks that no step of a search looks at."""
    return sum(min(block_size, n - b * block_size) for b in unseen_blocks(-(-n // block_size)))


def unseen_blocks(n_blocks: int) -> range:
    return range(N_ROTATED - 1, n_blocks, N_ROTATED)


def _moved(variant: Variant, group: Sequence[int], alpha: float) -> Variant:
    return variant_of([alpha if i in group else old for i, old in enumerate(variant)])
