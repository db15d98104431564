"""``meansparse sweep-alpha``: score each alpha on the held-out split and choose by a stated rule.

All alphas of a block of images go through the attacks as one stream (``grid``); after each block racing may drop alphas
that would not be chosen any more (``racing``); the choices are made by ``choice``. Every finished block is on disk.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..attacks import ATTACKS, PRESETS, expand_attacks, find_attack
from ..engine.grid import Family, Variant, VariantGrid, variant_of
from ..errors import ConfigError
from ..ledger import Decisions
from ..stats.multiple import is_clear
from ..stats.paired import paired_difference
from ..stats.verdict import MARGIN, Verdict, is_inside, verdict
from .choice import CURVES, OBJECTIVES, Choice, ChoiceRule, Curve, SweepPoint, allowed, choose, simultaneous_value
from .racing import Drop, Race, history_in, keep_history

OBJECTIVE_ATTACKS = {"apgd": ("apgd",), "worst": ("apgd-ce", "surrogate")}
"""What a sweep runs for an objective, where that is not APGD-CE alone."""


@dataclass(frozen=True)
class SweepSettings:
    """``alphas`` ascend and start with 0. ``site_weights`` (one a site, in [0, 1]): 0 switches the operator off there.

    ``rule`` decides which alpha the checkpoint gets; ``n_refine``: rounds in which the alphas halfway between the
    best one and its neighbours are scored too.
    """

    alphas: tuple[float, ...]
    rule: ChoiceRule
    site_weights: tuple[float, ...]
    racing: bool = True
    n_refine: int = 0

    def variant(self, alpha: float) -> Variant:
        """The alphas of all sites that a shared alpha means."""
        return variant_of([alpha * weight for weight in self.site_weights])


@dataclass(frozen=True)
class Sweep:
    """``points`` ascend from alpha = 0; ``paper`` and ``worst`` are always chosen; ``chosen`` counts."""

    points: list[SweepPoint]
    paper: Choice
    worst: Choice
    chosen: Choice
    drops: dict[Curve, list[tuple[float, Drop]]] = field(default_factory=dict)

    def at(self, alpha: float) -> SweepPoint:
        return next(point for point in self.points if point.alpha == alpha)

    @property
    def fate(self) -> Verdict | None:
        """The verdict of BPDA on the chosen alpha; None for alpha = 0."""
        critical = simultaneous_value(self.points, "worst")
        return what_bpda_makes_of(self.at(self.chosen.alpha), self.points[0], critical)

    def to_report(self) -> dict[str, Any]:
        """The whole curve, both choices, and what racing did. Fractions."""
        fate, choices = self.fate, {"paper": self.paper, "worst": self.worst, "chosen": self.chosen}
        return {
            "alpha": self.chosen.alpha,
            "rule": self.chosen.rule.in_words(),
            "reason": self.chosen.reason,
            "choices": {name: choice.to_report() for name, choice in choices.items()},
            "under_bpda": None if fate is None else {"verdict": fate.name, "reason": fate.reason},
            "critical_values": {curve: simultaneous_value(self.points, curve) for curve in CURVES},
            "racing": {curve: [_drop_to_report(*drop) for drop in drops] for curve, drops in self.drops.items()},
            "curve": [point.to_report(self.points[0]) for point in self.points],
        }


def _drop_to_report(alpha: float, drop: Drop) -> dict[str, Any]:
    return {"alpha": alpha, "n_examples": drop.n_examples, "behind": drop.difference, "bound": drop.bound}


def grid_of(alphas: Sequence[float]) -> tuple[tuple[float, ...], str]:
    """The alphas to score, ascending, without repeats, with 0 as the baseline; and what was changed, in words."""
    grid = tuple(sorted({0.0, *alphas}))
    if len(grid) < 2:
        raise ConfigError("the grid holds no alpha above 0", hint="for example --alphas 0.05:0.5:0.05")
    changes = []
    if len(set(alphas)) < len(alphas):
        changes.append("repeats were dropped")
    if list(alphas) != sorted(alphas):
        changes.append("sorted")
    if 0.0 not in alphas:
        changes.append("0 was added as the baseline")
    return grid, ", ".join(changes)


def families_of(attacks: Sequence[str], objective: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The plain and the BPDA attacks of a sweep: ``attacks`` (none: those of ``objective``), each with its twin.

    The preset ``surrogate``, the BPDA part of ``fast``, stands in the place of all twins. With an ``objective`` APGD-CE
    is the first of the plain ones, on which the paper's choice is made.

    >>> families_of((), "apgd")
    (('apgd-ce', 'apgd-dlr'), ('bpda-apgd-ce', 'bpda-apgd-dlr'))
    """
    wanted = expand_attacks(attacks or OBJECTIVE_ATTACKS.get(objective, ("apgd-ce",)))
    plain = [name for name in wanted if not find_attack(name).is_bpda] or ["apgd-ce"]
    missing = {"apgd-ce", "apgd-dlr"} - set(plain) if objective == "apgd" else set()
    if objective and not missing:  # what an attack before it breaks, APGD-CE would not be shown
        plain = list(dict.fromkeys(["apgd-ce", *plain]))
    others = {name for name in wanted if find_attack(name).is_bpda}
    twins = set() if others >= set(PRESETS["surrogate"]) else {f"bpda-{name}" for name in plain} & set(ATTACKS)
    bpda = expand_attacks(twins | others) if twins | others else []
    if attacks and missing:
        raise ConfigError(
            f"the objective {objective} needs {' and '.join(sorted(missing))}, which --attack leaves out",
            hint=f"add --attack {sorted(missing)[0]}, or choose another objective: {', '.join(OBJECTIVES)}",
        )
    return tuple(plain), tuple(bpda or ["bpda-apgd-ce"])


def sweep_alphas(
    grid: VariantGrid, settings: SweepSettings, *, on_points: Callable[[list[SweepPoint]], None] | None = None
) -> Sweep:
    """Score the alphas, refine them, choose. What ``grid`` has on disk is not computed again.

    ``on_points`` is told of all points so far after each block.
    """
    run = _Run(grid, settings, on_points or (lambda points: None))
    alphas = list(settings.alphas)
    sweep = run.score(alphas)
    for _ in range(settings.n_refine):
        best = run.decisions(alphas).once("refine around", lambda: sweep.chosen.best)  # noqa: B023
        alphas = sorted({*alphas, *halfway(alphas, best)})
        sweep = run.score(alphas)
    return sweep


def in_full(variants: Sequence[Variant]) -> dict[Family, Sequence[Variant]]:
    return {"plain": variants, "bpda": variants}


def point_of(grid: VariantGrid, variant: Variant, alpha: float, blocks: Sequence[int] | None = None) -> SweepPoint:
    """One variant's outcomes in ``grid``, on the images of ``blocks`` (all of them), under the name of an alpha."""
    plain, bpda, worst = (grid.measure(variant, curve, blocks) for curve in CURVES)
    apgd_ce = grid.measure(variant, "apgd-ce", blocks) if grid.attacks["plain"][:1] == ("apgd-ce",) else None
    return SweepPoint(alpha, grid.clean(variant, blocks), plain, bpda, worst, apgd_ce)


def halfway(alphas: Sequence[float], best: float) -> list[float]:
    """The alphas in the middle between ``best`` and its neighbours in ``alphas`` (ascending).

    >>> halfway([0.0, 0.1, 0.2, 0.3], 0.2)
    [0.15, 0.25]
    """
    i = list(alphas).index(best)
    return [float(f"{(best + alphas[j]) / 2:.6g}") for j in (i - 1, i + 1) if 0 <= j < len(alphas)]


def what_bpda_makes_of(point: SweepPoint, base: SweepPoint, critical: float) -> Verdict | None:
    """The verdict on one alpha: its plain gain against what is left of it in the worst case. None at alpha = 0.

    ``critical``: the simultaneous value of the worst curve. A gain within it is none: it is the best of several.
    """
    n = min(len(point.plain), len(point.worst))
    if point.alpha == 0 or not n:
        return None
    found = verdict(
        base_plain=base.plain[:n],
        sparsified_plain=point.plain[:n],
        base_worst=base.worst[:n],
        sparsified_worst=point.worst[:n],
    )
    if found.name == "real gain" and not is_clear(point.worst[:n], base.worst[:n], critical):
        words = f"{found.reason.split(':')[0]}: not clear after looking at every alpha"
        is_none = is_inside(paired_difference(point.worst[:n], base.worst[:n]).interval_95, MARGIN)
        return Verdict("no difference" if is_none else "inconclusive", words)
    return found


@dataclass(frozen=True)
class _Run:
    grid: VariantGrid
    settings: SweepSettings
    on_points: Callable[[list[SweepPoint]], None]

    def score(self, alphas: Sequence[float]) -> Sweep:
        """All blocks at all alphas, less what racing drops; then the choices, and these in full."""
        grid, variants = self.grid, {self.settings.variant(alpha): alpha for alpha in alphas}
        grid.classify(list(variants))
        races, looks = self._races(alphas)
        n_seen = 0
        for b, block in enumerate(grid.blocks):
            grid.score(b, self._wanted(races, list(variants) if b == 0 else [grid.base]))
            n_seen += len(block)
            if self.settings.racing and b + 1 < len(grid.blocks):
                for race in races.values():
                    race.look(n_seen)
                keep_history(looks, races)  # type: ignore[arg-type]
            self.on_points(self._points(variants))
        drops = {curve: [(variants[drop.column], drop) for drop in race.drops] for curve, race in races.items()}
        decisions = self.decisions(alphas)
        for turn in itertools.count():
            sweep = self._choose(self._points(variants), drops)
            marked = sorted({0.0} | {a for c in (sweep.paper, sweep.worst, sweep.chosen) for a in (c.alpha, c.best)})
            decided = decisions.once(f"score in full, {turn}", partial(list, marked))
            if not self._is_missing(marked) and not self._is_missing(decided):
                return sweep
            for b in range(len(grid.blocks)):  # whatever was chosen is scored on everything
                grid.score(b, self._in_full(decided))
        raise AssertionError("unreachable")

    def decisions(self, alphas: Sequence[float]) -> Decisions:
        variants = [self.settings.variant(alpha) for alpha in alphas]
        return self.grid.decisions("choice", variants, self.settings.racing, self.settings.rule)

    def _in_full(self, alphas: Sequence[float]) -> dict[Family, Sequence[Variant]]:
        return in_full([self.settings.variant(alpha) for alpha in alphas])

    def _is_missing(self, alphas: Sequence[float]) -> bool:
        return any(self.grid.count_missing(b, self._in_full(alphas)) for b in range(len(self.grid.blocks)))

    def _races(self, alphas: Sequence[float]) -> tuple[dict[Curve, Race], Decisions]:
        """A race on each curve that something is chosen on, among what keeps the clean constraint; their looks."""
        grid, rule = self.grid, self.settings.rule
        cleans = {alpha: grid.clean(self.settings.variant(alpha)) for alpha in alphas}
        running = [SweepPoint(alpha, clean, clean[:0], clean[:0], clean[:0]) for alpha, clean in cleans.items()]
        if self.settings.racing:
            running = allowed(running, rule.max_clean_drop)
        variants = [self.settings.variant(point.alpha) for point in running]
        curves: list[Curve] = ["plain"]
        if grid.attacks["plain"] != ("apgd-ce",):  # the paper's choice is made on APGD-CE alone
            curves = ["apgd-ce", "plain"] if rule.curve == "plain" else ["apgd-ce"]
        if grid.attacks["bpda"]:
            curves += ["worst", "bpda"] if rule.curve == "bpda" else ["worst"]
        # the same race is one among the same variants on the same blocks
        looks = grid.decisions("race", variants, curves)

        def race(curve: Curve) -> Race:
            return Race(variants, grid.base, len(grid), lambda v: grid.measure(v, curve), history_in(looks, curve))

        return {curve: race(curve) for curve in curves}, looks

    def _wanted(self, races: dict[Curve, Race], always: list[Variant]) -> dict[Family, Sequence[Variant]]:
        """The worst case needs both families of attacks, each of the other curves its own."""
        running: dict[str, list[Variant]] = {curve: race.running for curve, race in races.items()}
        plain = [*always, *(v for curve in ("plain", "apgd-ce", "worst") for v in running.get(curve, []))]
        bpda = [*always, *running.get("worst", []), *running.get("bpda", [])]
        return {"plain": list(dict.fromkeys(plain)), "bpda": list(dict.fromkeys(bpda))}

    def _points(self, variants: dict[Variant, float]) -> list[SweepPoint]:
        return [point_of(self.grid, v, alpha) for v, alpha in sorted(variants.items(), key=lambda item: item[1])]

    def _choose(self, points: list[SweepPoint], drops: dict[Curve, list[tuple[float, Drop]]]) -> Sweep:
        rule = self.settings.rule
        paper, worst = (
            rule if rule.curve == curve else ChoiceRule(curve, rule.max_clean_drop, rule.min_gain, rule.attacks)
            for curve in ("apgd-ce", "worst")
        )
        return Sweep(points, choose(points, paper), choose(points, worst), choose(points, rule), drops)
