"""``meansparse sweep-alpha``: score each alpha on the held-out split and choose by a stated rule.

All alphas of a block of images go through the attacks as one stream (``pairs``); after each block racing may drop alphas
that would not be chosen any more (``racing``); the choices are made by ``choice``. Every finished block is on disk.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..attacks import ATTACKS, expand_attacks, find_attack
from ..engine.journal import Journal
from ..engine.pairs import Column, Family, PairStore, column_of
from ..errors import ConfigError
from ..stats.multiple import is_clear
from ..stats.verdict import Verdict, verdict
from .choice import CURVES, OBJECTIVES, Choice, ChoiceRule, Curve, SweepPoint, allowed, choose, simultaneous_value
from .racing import Drop, Race, load_history, save_history


@dataclass(frozen=True)
class SweepSettings:
    """``alphas`` ascend and start with 0. ``site_weights`` (one a site, in [0, 1]): 0 switches the operator off there.

    ``rule`` decides which alpha the checkpoint carries; ``n_refine``: rounds in which the alphas halfway between the best
    one and its neighbours are scored too.
    """

    alphas: tuple[float, ...]
    rule: ChoiceRule
    site_weights: tuple[float, ...]
    racing: bool = True
    n_refine: int = 0

    def column(self, alpha: float) -> Column:
        """The alphas of all sites that a shared alpha means."""
        return column_of([alpha * weight for weight in self.site_weights])


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: ``points`` ascend from alpha = 0; ``paper`` and ``worst`` are always chosen; ``chosen`` counts."""

    points: list[SweepPoint]
    paper: Choice
    worst: Choice
    chosen: Choice
    drops: dict[Curve, list[tuple[float, Drop]]] = field(default_factory=dict)

    def at(self, alpha: float) -> SweepPoint:
        """The point of one alpha."""
        return next(point for point in self.points if point.alpha == alpha)

    @property
    def fate(self) -> Verdict | None:
        """What BPDA makes of the chosen alpha; None for alpha = 0."""
        critical = simultaneous_value(self.points, "worst")
        return what_bpda_makes_of(self.at(self.chosen.alpha), self.points[0], critical)

    def to_report(self) -> dict[str, Any]:
        """The whole curve, both choices, and what racing did. Fractions."""
        fate = self.fate
        return {
            "alpha": self.chosen.alpha,
            "rule": self.chosen.rule.in_words(),
            "reason": self.chosen.reason,
            "choices": {"paper": self.paper.to_report(), "worst": self.worst.to_report(), "chosen": self.chosen.to_report()},
            "under_bpda": None if fate is None else {"verdict": fate.name, "reason": fate.reason},
            "critical_values": {curve: simultaneous_value(self.points, curve) for curve in ("plain", "bpda", "worst")},
            "racing": {
                curve: [
                    {"alpha": alpha, "n_examples": drop.n_examples, "behind": drop.difference, "bound": drop.bound}
                    for alpha, drop in drops
                ]
                for curve, drops in self.drops.items()
            },
            "curve": [point.to_report(self.points[0]) for point in self.points],
        }  # fmt: skip


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
    """The plain and the BPDA attacks of a sweep: ``attacks`` as asked for (none: those of ``objective``), each with its twin.

    With an ``objective`` APGD-CE is the first of them, on which the paper's choice is made.

    >>> families_of((), "apgd")
    (('apgd-ce', 'apgd-dlr'), ('bpda-apgd-ce', 'bpda-apgd-dlr'))
    """
    wanted = expand_attacks(attacks or (("apgd",) if objective == "apgd" else ("apgd-ce",)))
    plain = [name for name in wanted if not find_attack(name).is_bpda] or ["apgd-ce"]
    missing = {"apgd-ce", "apgd-dlr"} - set(plain) if objective == "apgd" else set()
    if objective and not missing:  # what an attack before it breaks, APGD-CE would not be shown
        plain = list(dict.fromkeys(["apgd-ce", *plain]))
    twins = {f"bpda-{name}" for name in plain} & set(ATTACKS)
    others = {name for name in wanted if find_attack(name).is_bpda}
    bpda = expand_attacks(twins | others) if twins | others else []
    if attacks and missing:
        raise ConfigError(
            f"the objective {objective} needs {' and '.join(sorted(missing))}, which --attack leaves out",
            hint=f"add --attack {sorted(missing)[0]}, or choose another objective: {', '.join(OBJECTIVES)}",
        )
    return tuple(plain), tuple(bpda or ["bpda-apgd-ce"])


def sweep_alphas(
    store: PairStore,
    settings: SweepSettings,
    *,
    on_block: Callable[[str, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_points: Callable[[list[SweepPoint]], None] | None = None,
) -> Sweep:
    """Score the grid, refine it, choose. What ``store`` has on disk is not computed again.

    ``on_block`` is told what begins and how many (image, alpha, attack) triples it holds, ``on_progress`` of those done.
    """
    run = _Run(store, settings, on_block, on_progress, on_points)
    alphas = list(settings.alphas)
    sweep = run.score(alphas)
    for _ in range(settings.n_refine):
        best = run.journal(alphas).once("refine around", lambda: sweep.chosen.best)  # noqa: B023
        alphas = sorted({*alphas, *halfway(alphas, best)})
        sweep = run.score(alphas)
    return sweep


def point_of(store: PairStore, column: Column, alpha: float, blocks: Sequence[int] | None = None) -> SweepPoint:
    """What ``store`` knows of one column, on the images of ``blocks`` (all of them), under the name of an alpha."""
    plain, bpda, worst = (store.measure(column, curve, blocks) for curve in CURVES)
    apgd_ce = store.measure(column, "apgd-ce", blocks) if store.attacks["plain"][:1] == ("apgd-ce",) else None
    return SweepPoint(alpha, store.clean(column, blocks), plain, bpda, worst, apgd_ce)


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
        base_plain=base.plain[:n], sparsified_plain=point.plain[:n], base_worst=base.worst[:n], sparsified_worst=point.worst[:n]
    )  # fmt: skip
    if found.name == "real gain" and not is_clear(point.worst[:n], base.worst[:n], critical):
        words = f"{found.reason.split(':')[0]}: not clear after looking at every alpha"
        return Verdict("no difference", words)
    return found


class _Run:
    def __init__(
        self, store: PairStore, settings: SweepSettings, on_block: Callable[[str, int], None] | None,
        on_progress: Callable[[int], None] | None, on_points: Callable[[list[SweepPoint]], None] | None,
    ) -> None:  # fmt: skip
        self.store, self.settings = store, settings
        self.on_block, self.on_progress, self.on_points = on_block, on_progress, on_points

    def score(self, alphas: Sequence[float]) -> Sweep:
        """All blocks at all alphas, less what racing drops; then the choices, and these in full."""
        store, columns = self.store, {self.settings.column(alpha): alpha for alpha in alphas}
        store.classify(list(columns))
        races, history = self._races(alphas)
        n_seen = 0
        for b, block in enumerate(store.blocks):
            self._score_block(b, self._wanted(races, list(columns) if b == 0 else [store.base]))
            n_seen += len(block)
            if self.settings.racing and b + 1 < len(store.blocks):
                for race in races.values():
                    race.look(n_seen)
                save_history(history, {str(curve): race for curve, race in races.items()})
            if self.on_points is not None:
                self.on_points(self._points(columns))
        drops = {curve: [(columns[drop.column], drop) for drop in race.drops] for curve, race in races.items()}
        journal = self.journal(alphas)
        for turn in itertools.count():
            sweep = self._choose(self._points(columns), drops)
            marked = sorted({0.0} | {a for c in (sweep.paper, sweep.worst, sweep.chosen) for a in (c.alpha, c.best)})
            decided = journal.once(f"score in full, {turn}", lambda: marked)  # noqa: B023
            if not self._is_missing(marked) and not self._is_missing(decided):
                return sweep
            for b in range(len(store.blocks)):  # whatever was chosen is scored on everything
                self._score_block(b, self._in_full(decided))
        raise AssertionError("unreachable")

    def journal(self, alphas: Sequence[float]) -> Journal:
        """The decisions of this sweep at ``alphas``."""
        rule, blocks = self.settings.rule, [len(block) for block in self.store.blocks]
        columns = [self.settings.column(alpha) for alpha in alphas]
        return Journal(
            self.store.folder, "choice", (columns, self.settings.racing, rule, blocks, self.store.ids.tolist())
        )

    def _in_full(self, alphas: Sequence[float]) -> dict[Family, Sequence[Column]]:
        columns = [self.settings.column(alpha) for alpha in alphas]
        return {"plain": columns, "bpda": columns}

    def _is_missing(self, alphas: Sequence[float]) -> bool:
        return any(self.store.count_missing(b, self._in_full(alphas)) for b in range(len(self.store.blocks)))

    def _races(self, alphas: Sequence[float]) -> tuple[dict[Curve, Race], Path]:
        """A race for each curve that something is chosen on, among the alphas that keep the clean constraint; their file."""
        cleans = {alpha: self.store.clean(self.settings.column(alpha)) for alpha in alphas}
        running = [SweepPoint(alpha, clean, clean[:0], clean[:0], clean[:0]) for alpha, clean in cleans.items()]
        if self.settings.racing:
            running = allowed(running, self.settings.rule.max_clean_drop)
        columns = [self.settings.column(point.alpha) for point in running]
        curves: list[Curve] = ["plain"]
        if self.store.attacks["plain"] != ("apgd-ce",):  # the paper's choice is made on APGD-CE alone
            curves = ["apgd-ce", "plain"] if self.settings.rule.curve == "plain" else ["apgd-ce"]
        if self.store.attacks["bpda"]:
            curves += ["worst", "bpda"] if self.settings.rule.curve == "bpda" else ["worst"]

        # the same race is one among the same columns on the same blocks
        key = repr((columns, curves, [len(block) for block in self.store.blocks], self.store.ids.tolist())).encode()
        file = self.store.folder / f"race-{hashlib.sha256(key).hexdigest()[:16]}.json"
        history = load_history(file)

        def race(curve: Curve) -> Race:
            n = len(self.store.x)
            return Race(columns, self.store.base, n, lambda c: self.store.measure(c, curve), history.get(curve))

        return {curve: race(curve) for curve in curves}, file

    def _wanted(self, races: dict[Curve, Race], always: list[Column]) -> dict[Family, Sequence[Column]]:
        """The worst case needs both families of attacks, each of the other curves its own."""
        running: dict[str, list[Column]] = {curve: race.running for curve, race in races.items()}
        plain = [*always, *(c for curve in ("plain", "apgd-ce", "worst") for c in running.get(curve, []))]
        bpda = [*always, *running.get("worst", []), *running.get("bpda", [])]
        return {"plain": list(dict.fromkeys(plain)), "bpda": list(dict.fromkeys(bpda))}

    def _score_block(self, b: int, wanted: dict[Family, Sequence[Column]]) -> None:
        n = self.store.count_missing(b, wanted)
        if n and self.on_block is not None:
            n_alphas = len({*wanted["plain"], *wanted["bpda"]})
            self.on_block(f"images {int(self.store.blocks[b][-1]) + 1} of {len(self.store.x)}, {n_alphas} alphas", n)
        self.store.score(b, wanted, self.on_progress)

    def _points(self, columns: dict[Column, float]) -> list[SweepPoint]:
        return [point_of(self.store, c, a) for c, a in sorted(columns.items(), key=lambda item: item[1])]

    def _choose(self, points: list[SweepPoint], drops: dict[Curve, list[tuple[float, Drop]]]) -> Sweep:
        rule = self.settings.rule
        own_gain = rule.min_gain
        paper = rule if rule.curve == "apgd-ce" else ChoiceRule("apgd-ce", rule.max_clean_drop, own_gain, rule.attacks)
        worst = rule if rule.curve == "worst" else ChoiceRule("worst", rule.max_clean_drop, own_gain, rule.attacks)
        return Sweep(points, choose(points, paper), choose(points, worst), choose(points, rule), drops)
