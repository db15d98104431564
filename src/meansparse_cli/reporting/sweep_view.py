"""What people see of a sweep: the table while it runs, and the choices in words."""

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from ..selection.choice import SweepPoint
from ..selection.sweep import Sweep
from ..stats.accuracy import accuracy_of, paired_difference
from .console import WIDE, console, percent


def say_sweep(sweep: Sweep, say: Callable[[str], None]) -> None:
    """Both choices, which one the checkpoint carries, what BPDA makes of it, and what would tell the best two apart."""
    say(f"the paper's rule:   {sweep.paper.reason}")
    say(f"the worst case's:   {sweep.worst.reason}")
    chosen = sweep.chosen
    if chosen.rule.curve in ("bpda", "plain"):
        say(f"{'under BPDA' if chosen.rule.curve == 'bpda' else 'under APGD'}:         {chosen.reason}")
    fate = sweep.fate
    if fate is not None:
        say(f"what BPDA makes of alpha = {chosen.alpha:g}: {fate.name} ({fate.reason})")
    if chosen.runner_up is not None:
        apart = (
            "no number of images" if chosen.examples_to_tell is None else f"about {chosen.examples_to_tell:,} images"
        )
        say(f"{apart} would tell alpha = {chosen.best:g} from {chosen.runner_up:g} on this curve (5 %, power 80 %)")
    for curve, drops in sweep.drops.items():
        if drops:
            gone = ", ".join(f"{alpha:g} after {drop.n_examples}" for alpha, drop in drops)
            say(f"racing on the {curve} curve dropped alpha = {gone} images; --no-racing scores them all")


def show_sweep(points: Sequence[SweepPoint], attacks: Sequence[str], chosen: float | None) -> Table:
    """The sweep so far, as people read it; what a terminal of 80 columns has no room for is left out there."""
    title = f"held-out split, plain = {', '.join(attacks)} (differences are paired, ± standard error)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    differences = {"clean - base": 0, "plain - base": 1, "worst - base": 3}
    if console.width < WIDE:
        del differences["clean - base"]
    for column in ("alpha", "clean %", "plain %", "BPDA %", "worst %", *differences, "images"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        masks = (point.clean, point.plain, point.bpda, point.worst)
        base = (points[0].clean, points[0].plain, points[0].bpda, points[0].worst)
        n_plain, n_worst = len(point.plain), len(point.worst)
        table.add_row(
            f"{point.alpha:g}",
            *[_accuracy(mask) for mask in masks],
            *["" if point.alpha == 0 else _difference(masks[i], base[i]) for i in differences.values()],
            f"{n_plain}" if n_plain == n_worst else f"{n_plain}, {n_worst}",
            style="bold green" if point.alpha == chosen else None,
        )
    return table


def _accuracy(mask: Tensor) -> str:
    return percent(accuracy_of(mask).fraction) if len(mask) else ""


def _difference(mine: Tensor, base: Tensor) -> str:
    n = min(len(mine), len(base))
    if not n:
        return ""
    difference = paired_difference(mine[:n], base[:n])
    return percent(difference.difference, difference.standard_error, signed=True)
