"""``--alpha-rule``: one alpha for all sites, one for each stage or site (``search``), or a threshold for each channel
(``learned``); and the checkpoint of it.
"""

from dataclasses import dataclass, replace
from typing import Any

from ..engine.grid import Variant, VariantGrid
from ..operator.checkpoint import Checkpoint
from ..stats.format import in_points
from ..stats.multiple import critical_value
from ..stats.paired import PairedDifference, paired_difference
from ..stats.verdict import Verdict
from .choice import SweepPoint
from .learned import Learned
from .search import candidates_of, depth_groups, search_alphas, site_groups, unseen_blocks
from .sweep import Sweep, SweepSettings, in_full, point_of, sweep_alphas, what_bpda_makes_of


@dataclass(frozen=True)
class Finding:
    """What a rule other than ``shared`` found, and ``how``, in words; ``details`` for the report.

    ``checkpoint`` has it, ``variant`` is what it is in the cells of its operators; ``is_moved``: it is not where the
    rule began.
    """

    rule: str
    how: str
    what: str
    details: dict[str, Any]
    checkpoint: Checkpoint
    variant: Variant
    is_moved: bool


@dataclass(frozen=True)
class SearchResult:
    """A finding compared on held-out images that no step of its rule looked at.

    All of it on those images alone: ``gain`` over alpha = 0, ``over_shared`` over the shared choice; ``is_carried``: it
    is not behind the shared choice and keeps the rule of the choice; ``point`` and ``base``: all measures of it and of
    alpha = 0; ``fate``: what BPDA makes of it.
    """

    found: Finding
    point: SweepPoint
    base: SweepPoint
    gain: PairedDifference
    over_shared: PairedDifference
    critical: float
    is_carried: bool
    fate: Verdict | None

    def in_words(self, curve: str, shared: float) -> list[str]:
        gains = [in_points(d.difference, d.standard_error) for d in (self.gain, self.over_shared)]
        found = self.found
        words = [
            f"{found.rule}: {found.how}; on {curve}, on {self.gain.n:,} images that no step looked at (the sweep "
            f"before it did): {gains[0]} points against alpha = 0, {gains[1]} against the shared alpha"
        ]
        if not self.is_carried:
            why = (
                "what the search found does not gain what the rule asks"
                if found.is_moved
                else "the search moved nothing"
            )
            return [*words, f"the checkpoint carries the shared alpha = {shared:g}: {why} (found: {found.what})"]
        words.append(
            f"the checkpoint carries these alphas: {found.what}; the test split has to say what they are worth"
        )
        if self.fate is not None:
            words.append(f"what BPDA makes of them: {self.fate.name} ({self.fate.reason})")
        return words

    def to_report(self) -> dict[str, Any]:
        unseen = {
            "n_examples": self.gain.n,
            "point": self.point.to_report(self.base),
            "minus_base": self.gain.difference,
            "minus_base_standard_error": self.gain.standard_error,
            "minus_shared": self.over_shared.difference,
            "minus_shared_standard_error": self.over_shared.standard_error,
        }
        return self.found.details | {
            "unseen": unseen,
            "critical_value": self.critical,
            "is_carried": self.is_carried,
            "under_bpda": None if self.fate is None else {"verdict": self.fate.name, "reason": self.fate.reason},
        }


def alphas_by_rule(
    rule: str, grid: VariantGrid, settings: SweepSettings, sweep: Sweep, checkpoint: Checkpoint
) -> tuple[Sweep, Checkpoint, dict[str, Any]]:
    """The checkpoint that ``rule`` leads to, and what goes into the report about it.

    ``shared``: the sweep's choice; ``learned`` begins with it (``thresholds_by_rule``). ``per-depth`` and ``per-site``:
    a search that starts there. Its result is taken if it keeps the rule of the choice (clean constraint, minimum gain
    over alpha = 0) on images that it did not look at; otherwise the shared choice stays. The sweep that comes back is
    on the pools that the search has filled, so that the base model has been tried on every image that anything found.
    """
    if rule in ("shared", "learned"):
        return sweep, replace(checkpoint, alpha=sweep.chosen.alpha), {}
    groups = depth_groups(grid.sites) if rule == "per-depth" else site_groups(grid.sites)
    start = settings.variant(grid.decisions("start", settings, groups).once("alpha", lambda: sweep.chosen.alpha))
    candidates = candidates_of(settings.alphas)
    found = search_alphas(grid, groups, start=start, candidates=candidates, rule=settings.rule)
    for b in range(len(grid.blocks)):
        grid.score(b, in_full([grid.base, start, found.variant]))
    sweep = sweep_alphas(grid, settings)
    n_accepted = sum(step.is_accepted for step in found.steps)
    finding = Finding(
        rule=rule,
        how=f"{n_accepted} of {len(found.steps)} steps were confirmed",
        what=", ".join(f"{alpha:g}" for alpha in found.variant),
        details=found.to_report(grid.sites),
        checkpoint=with_site_alphas(checkpoint, found.variant),
        variant=found.variant,
        is_moved=n_accepted > 0,
    )
    return sweep, *_carried(finding, grid, grid, settings, replace(checkpoint, alpha=sweep.chosen.alpha))


def thresholds_by_rule(
    learned: Learned, theirs: VariantGrid, grid: VariantGrid, settings: SweepSettings, shared: Checkpoint
) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint with learned thresholds; ``shared``, the sweep's, where they do not keep the rule of its choice.

    ``theirs``: the cells of the operators that have them, judged on images that neither taught nor stopped the
    learning.
    """
    variant = settings.variant(learned.checkpoint.alpha or 0.0)
    for b in unseen_blocks(len(grid.blocks)):
        theirs.score(b, in_full([theirs.base, variant]), "learned thresholds, ")
    low, high = min(map(min, learned.alphas)), max(map(max, learned.alphas))
    finding = Finding(
        rule="learned",
        how=learned.in_words,
        what=f"{low:g} to {high:g} standard deviations, a threshold for each channel",
        details=learned.to_report(grid.sites),
        checkpoint=learned.checkpoint,
        variant=variant,
        is_moved=learned.kept > 0 and high > 0,
    )
    return _carried(finding, theirs, grid, settings, shared)


def _carried(
    found: Finding, theirs: VariantGrid, grid: VariantGrid, settings: SweepSettings, shared: Checkpoint
) -> tuple[Checkpoint, dict[str, Any]]:
    """``found``, of the cells ``theirs``, or ``shared``, of ``grid``; and what the report says of it."""
    rule, unseen = settings.rule, unseen_blocks(len(grid.blocks))
    alpha = shared.alpha or 0.0
    mine, base = (theirs.measure(variant, rule.curve, unseen) for variant in (found.variant, theirs.base))
    others = grid.measure(settings.variant(alpha), rule.curve, unseen)
    critical = critical_value([(mine, other) for other in (base, others)])
    over_shared = paired_difference(mine, others)
    point = point_of(theirs, found.variant, max(found.variant), unseen)
    without = point_of(theirs, theirs.base, 0.0, unseen)
    keeps_clean = point.clean.double().mean() >= without.clean.double().mean() - rule.max_clean_drop - 1e-12
    is_enough = over_shared.difference >= 0 and rule.is_enough(mine, base, critical)
    result = SearchResult(
        found=found,
        point=point,
        base=without,
        gain=paired_difference(mine, base),
        over_shared=over_shared,
        critical=critical,
        # a search holds the clean constraint itself, on all images
        is_carried=found.is_moved and is_enough and (theirs is grid or bool(keeps_clean)),
        fate=what_bpda_makes_of(point, without, critical_value([(point.worst, without.worst)])),
    )
    report = {"search": result.to_report(), "in_words": result.in_words(rule.curve, alpha)}
    return found.checkpoint if result.is_carried else shared, report


def with_site_alphas(checkpoint: Checkpoint, variant: Variant) -> Checkpoint:
    """``checkpoint`` with an alpha for each active site: the largest is ``alpha``, the others are shares of it."""
    alphas = dict(zip((site.index for site in checkpoint.active), variant, strict=True))
    largest = max(variant)
    if largest == 0:
        return replace(checkpoint, alpha=0.0)
    weights = tuple(alphas.get(site.index, 0.0) / largest for site in checkpoint.sites)
    return replace(checkpoint, alpha=largest, site_weights=weights)
