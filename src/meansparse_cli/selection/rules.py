"""``--alpha-rule``: one alpha for all sites, or one for each stage or site (``search``); and the checkpoint of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..engine.grid import Variant, VariantGrid
from ..operator.checkpoint import Checkpoint
from ..sites.find import Site
from ..stats.format import in_points
from ..stats.multiple import critical_value
from ..stats.paired import PairedDifference, paired_difference
from ..stats.verdict import Verdict
from .choice import SweepPoint
from .search import Found, candidates_of, depth_groups, search_alphas, site_groups, unseen_blocks
from .sweep import Sweep, SweepSettings, in_full, point_of, sweep_alphas, what_bpda_makes_of


@dataclass(frozen=True)
class SearchResult:
    """An alpha for each site, compared on held-out images that no step of the search looked at.

    All of it on those images alone: ``gain`` over alpha = 0, ``over_shared`` over the shared choice; ``is_carried``: it
    is not behind the shared choice and gains what the rule asks; ``point`` and ``base``: all measures of it and of
    alpha = 0; ``fate``: what BPDA makes of it.
    """

    rule: str
    found: Found
    point: SweepPoint
    base: SweepPoint
    gain: PairedDifference
    over_shared: PairedDifference
    critical: float
    is_carried: bool
    fate: Verdict | None

    def in_words(self, curve: str, shared: float) -> list[str]:
        n_accepted = sum(step.is_accepted for step in self.found.steps)
        gains = [in_points(d.difference, d.standard_error) for d in (self.gain, self.over_shared)]
        words = [
            f"{self.rule}: {n_accepted} of {len(self.found.steps)} steps were confirmed; on {curve}, on "
            f"{self.gain.n:,} images that no step looked at (the sweep before it did): {gains[0]} points against "
            f"alpha = 0, {gains[1]} against the shared alpha"
        ]
        alphas = ", ".join(f"{alpha:g}" for alpha in self.found.variant)
        if not self.is_carried:
            why = (
                "the search moved nothing"
                if not n_accepted
                else "what the search found does not gain what the rule asks"
            )
            return [*words, f"the checkpoint carries the shared alpha = {shared:g}: {why} (found: {alphas})"]
        words.append(f"the checkpoint carries these alphas: {alphas}; the test split has to say what they are worth")
        if self.fate is not None:
            words.append(f"what BPDA makes of them: {self.fate.name} ({self.fate.reason})")
        return words

    def to_report(self, sites: Sequence[Site]) -> dict[str, Any]:
        unseen = {
            "n_examples": self.gain.n,
            "point": self.point.to_report(self.base),
            "minus_base": self.gain.difference,
            "minus_base_standard_error": self.gain.standard_error,
            "minus_shared": self.over_shared.difference,
            "minus_shared_standard_error": self.over_shared.standard_error,
        }
        return self.found.to_report(sites) | {
            "unseen": unseen,
            "critical_value": self.critical,
            "is_carried": self.is_carried,
            "under_bpda": None if self.fate is None else {"verdict": self.fate.name, "reason": self.fate.reason},
        }


def alphas_by_rule(
    rule: str, grid: VariantGrid, settings: SweepSettings, sweep: Sweep, checkpoint: Checkpoint
) -> tuple[Sweep, Checkpoint, dict[str, Any]]:
    """The checkpoint that ``rule`` leads to, and what goes into the report about it.

    ``shared``: the sweep's choice. ``per-depth`` and ``per-site``: a search that starts there. Its result is taken if
    it keeps the rule of the choice (clean constraint, minimum gain over alpha = 0) on images that it did not look at;
    otherwise the shared choice stays. The sweep that comes back is on the pools that the search has filled, so that the
    base model has been tried on every image that anything found.
    """
    if rule == "shared":
        return sweep, replace(checkpoint, alpha=sweep.chosen.alpha), {}
    groups = depth_groups(grid.sites) if rule == "per-depth" else site_groups(grid.sites)
    start = settings.variant(grid.decisions("start", settings, groups).once("alpha", lambda: sweep.chosen.alpha))
    candidates = candidates_of(settings.alphas)
    found = search_alphas(grid, groups, start=start, candidates=candidates, rule=settings.rule)
    for b in range(len(grid.blocks)):
        grid.score(b, in_full([grid.base, start, found.variant]))
    sweep = sweep_alphas(grid, settings)
    result = compare_on_unseen(rule, found, grid, settings, sweep)
    shared = sweep.chosen.alpha
    report = {"search": result.to_report(grid.sites), "in_words": result.in_words(settings.rule.curve, shared)}
    if not result.is_carried:
        return sweep, replace(checkpoint, alpha=shared), report
    return sweep, with_site_alphas(checkpoint, found.variant), report


def compare_on_unseen(
    rule: str, found: Found, grid: VariantGrid, settings: SweepSettings, sweep: Sweep
) -> SearchResult:
    """``found`` against alpha = 0 and the shared choice, on the images that no step of the search looked at."""
    curve, unseen = settings.rule.curve, unseen_blocks(len(grid.blocks))
    variants = found.variant, grid.base, settings.variant(sweep.chosen.alpha)
    mine, base, shared = (grid.measure(variant, curve, unseen) for variant in variants)
    critical = critical_value([(mine, other) for other in (base, shared)])
    over_shared = paired_difference(mine, shared)
    is_moved = any(step.is_accepted for step in found.steps)
    alone = point_of(grid, found.variant, max(found.variant), unseen)
    without = point_of(grid, grid.base, 0.0, unseen)
    return SearchResult(
        rule=rule,
        found=found,
        point=alone,
        base=without,
        gain=paired_difference(mine, base),
        over_shared=over_shared,
        critical=critical,
        is_carried=is_moved and over_shared.difference >= 0 and settings.rule.is_enough(mine, base, critical),
        fate=what_bpda_makes_of(alone, without, critical_value([(alone.worst, without.worst)])),
    )


def with_site_alphas(checkpoint: Checkpoint, variant: Variant) -> Checkpoint:
    """``checkpoint`` with an alpha for each active site: the largest is ``alpha``, the others are shares of it."""
    alphas = dict(zip((site.index for site in checkpoint.active), variant, strict=True))
    largest = max(variant)
    if largest == 0:
        return replace(checkpoint, alpha=0.0)
    weights = tuple(alphas.get(site.index, 0.0) / largest for site in checkpoint.sites)
    return replace(checkpoint, alpha=largest, site_weights=weights)
