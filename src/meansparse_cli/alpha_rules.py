"""``--alpha-rule``: one alpha for all sites, or one for each stage or site (``alpha_search``); and the checkpoint of it."""

from dataclasses import replace
from typing import Any

from .accuracy import paired_difference
from .alpha_search import candidates_of, depth_groups, search_alphas, site_groups
from .checkpoint import Checkpoint
from .choice import SweepPoint, simultaneous_value
from .console import LiveView, percent
from .pairs import Column, PairStore
from .simultaneous import is_clear
from .sweep_alpha import Sweep, SweepSettings


def alphas_by_rule(
    rule: str, store: PairStore, settings: SweepSettings, sweep: Sweep, checkpoint: Checkpoint, view: LiveView
) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint that ``rule`` leads to, and what goes into the report about it.

    ``shared``: the sweep's choice. ``per-depth`` and ``per-site``: a search that starts there. Its result is carried if it
    keeps the rule of the choice (clean constraint, minimum gain over alpha = 0); otherwise the shared choice stays.
    """
    shared = sweep.chosen.alpha
    if rule == "shared":
        return replace(checkpoint, alpha=shared), {}
    sites = store.model.sites
    found = search_alphas(
        store, depth_groups(sites) if rule == "per-depth" else site_groups(sites), start=settings.column(shared),
        candidates=candidates_of(settings.alphas), rule=settings.rule, on_block=view.begin, on_progress=view.advance,
    )  # fmt: skip
    for b in range(len(store.blocks)):
        store.score(b, {"plain": [found.column], "bpda": [found.column]}, view.advance)
    curve, base = settings.rule.curve, sweep.points[0]
    point = SweepPoint(
        max(found.column), store.clean(found.column), store.measure(found.column, "plain"),
        store.measure(found.column, "bpda"), store.measure(found.column, "worst"),
    )  # fmt: skip
    gain = paired_difference(point.measure(curve), base.measure(curve))
    critical = simultaneous_value([*sweep.points, point], curve)
    if settings.rule.needs_clear_gain:
        is_enough = gain.difference > 0 and is_clear(point.measure(curve), base.measure(curve), critical)
    else:
        is_enough = gain.difference > 0 and gain.difference >= (settings.rule.min_gain or 0.0) * gain.standard_error
    is_moved = found.column != settings.column(shared)
    carried = is_moved and is_enough
    n_accepted = sum(step.is_accepted for step in found.steps)
    words = [
        f"{rule}: {n_accepted} of {len(found.steps)} steps were confirmed; on {curve} "
        f"{percent(gain.difference, gain.standard_error, signed=True)} points against alpha = 0 on the images that the search "
        "looked at (the test split has to say what it is worth)",
        "the checkpoint carries these alphas: " + ", ".join(f"{alpha:g}" for alpha in found.column)
        if carried
        else f"the checkpoint carries the shared alpha = {shared:g}: "
        + ("the search found nothing better" if not is_moved else "the gain of the search is too small for the rule"),
    ]
    report = {
        "search": found.to_report(sites)
        | {"point": point.to_report(base), "is_carried": carried, "critical_value": critical},
        "in_words": words,
    }
    if not carried:
        return replace(checkpoint, alpha=shared), report
    return with_site_alphas(checkpoint, found.column), report


def with_site_alphas(checkpoint: Checkpoint, column: Column) -> Checkpoint:
    """``checkpoint`` with an alpha for each of its active sites: the largest is ``alpha``, the others are shares of it."""
    alphas = dict(zip((site.index for site in checkpoint.active), column, strict=True))
    largest = max(column)
    if largest == 0:
        return replace(checkpoint, alpha=0.0)
    weights = tuple(alphas.get(site.index, 0.0) / largest for site in checkpoint.sites)
    return replace(checkpoint, alpha=largest, site_weights=weights)
