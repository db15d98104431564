"""The tables of a sweep and of a measurement, from the ``results`` of their reports, and a sweep's choices in words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Group

from ..stats.format import in_points, percent
from .console import is_wide
from .table import Table

if TYPE_CHECKING:
    from ..selection.choice import SweepPoint
    from ..selection.sweep import Sweep

CURVES = {"clean": "clean", "plain": "plain attacks", "bpda": "BPDA", "worst": "worst case"}


def sweep_table(results: dict[str, Any], *, gains: Iterable[str] = ()) -> Table:
    """The alphas of a sweep on the held-out split; the chosen one stands out.

    ``gains``: the curves whose paired difference from alpha = 0 is shown as well, instead of the standard errors.
    """
    gains, n = list(gains), results["n_examples"]
    curve = sorted(results["curve"], key=lambda row: row["alpha"])
    scored = [name for name in CURVES if "accuracy" in results["curve"][0].get(name, {})]
    columns = {
        "alpha": [f"{row['alpha']:g}" for row in curve],
        **{
            f"{name if gains else CURVES[name]} %": [_accuracy(row[name], n, with_error=not gains) for row in curve]
            for name in scored
        },
        **{f"{name} - base": [_minus_base(row, name) for row in curve] for name in gains},
    }
    chosen = "" if results["alpha"] is None else f"; chosen: {results['alpha']:g}"
    strong = frozenset(i for i, row in enumerate(curve) if row["alpha"] == results["alpha"])
    return Table.of(f"Sweep over alpha on {n:,} held-out images{chosen}", columns, strong=strong)


def show_sweep(points: Sequence["SweepPoint"], attacks: Sequence[str], chosen: float | None) -> Group:
    """For the terminal: the sweep so far; what one of 80 columns has no room for is left out there."""
    curve = [point.to_report(points[0]) for point in points]
    results = {"curve": curve, "n_examples": len(points[0].clean), "alpha": chosen}
    table = sweep_table(results, gains=("clean", "plain", "worst") if is_wide() else ("plain", "worst"))
    title = f"held-out split, plain = {', '.join(attacks)} (differences are paired, ± standard error)"
    return replace(table, title=title).to_rich(strong="bold green")


def measurement_table(results: dict[str, Any], *, with_errors: bool = False) -> Table:
    """A row an alpha, or a site rule, of a measurement; the columns that say nothing are left out."""
    base_first = sorted(results["rows"], key=lambda row: row["alpha"] != 0)
    rows = [row for eps in dict.fromkeys(row["eps"] for row in base_first) for row in base_first if row["eps"] == eps]
    names = {"eps": [row["eps"] for row in rows], "sites": [row["sites"] if row["alpha"] else "" for row in rows]}
    shown = {name: cells for name, cells in names.items() if len(set(cells) - {""}) > 1}
    curves = ("clean", "plain", "worst") if results["attacks"] else ("clean",)
    cells = {
        **shown,
        "alpha": [f"{row['alpha']:g}" for row in rows],
        **{f"{curve} %": [_accuracy(row[curve], None, with_error=with_errors) for row in rows] for curve in curves},
        **{f"{curve} - base": [_minus_base(row, curve) for row in rows] for curve in curves[1:] or curves},
    }
    attacked = f"plain = {', '.join(results['attacks'])}" if results["attacks"] else "none of them attacked"
    title = f"Measurement on {results['n_examples']:,} {results['split']} images, {attacked}"
    return Table.of(title, cells)


def say_sweep(sweep: "Sweep", say: Callable[[str], None]) -> None:
    """Both choices, which one the checkpoint has, what BPDA makes of it, and what would tell the best two apart."""
    say(f"the paper's rule:   {sweep.paper.reason}")
    say(f"the worst case's:   {sweep.worst.reason}")
    chosen = sweep.chosen
    if chosen.rule.curve in ("bpda", "plain"):
        say(f"{'under BPDA' if chosen.rule.curve == 'bpda' else 'under APGD'}:         {chosen.reason}")
    fate = sweep.fate
    if fate is not None:
        say(f"what BPDA makes of alpha = {chosen.alpha:g}: {fate.name} ({fate.reason})")
    if chosen.runner_up is not None:
        n = chosen.examples_to_tell
        apart = "no number of images" if n is None else f"about {n:,} images"
        say(f"{apart} would tell alpha = {chosen.best:g} from {chosen.runner_up:g} on this curve (5 %, power 80 %)")
    for curve, drops in sweep.drops.items():
        if drops:
            gone = ", ".join(f"{alpha:g} after {drop.n_examples}" for alpha, drop in drops)
            say(f"racing on the {curve} curve dropped alpha = {gone} images; --no-racing scores them all")


def _accuracy(found: dict[str, Any], n_all: int | None, *, with_error: bool) -> str:
    """An accuracy; on how many images, where that is fewer than ``n_all``, as for an alpha that racing dropped."""
    if "accuracy" not in found:
        return ""
    n = found.get("n_examples", 0)
    text = percent(found["accuracy"], found["standard_error"] if with_error else None)
    return text if n_all is None or n == n_all else f"{text} of {n}"


def _minus_base(row: dict[str, Any], curve: str) -> str:
    found = row[curve]
    if not row["alpha"] or "minus_base" not in found:
        return ""
    return in_points(found["minus_base"], found["minus_base_standard_error"])
