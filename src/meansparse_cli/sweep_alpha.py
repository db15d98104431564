"""``meansparse sweep-alpha``: score each alpha on the held-out split and choose one by a stated rule.

Every alpha faces the same attacks on the same examples with the same seeds, so that differences between alphas are
paired. Each finished alpha is on disk before the next one starts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from .accuracy import accuracy_of, paired_difference
from .artifacts import load_torch, save_torch
from .attacks import run_attack
from .attacks.result import Budget
from .console import percent
from .curve import AlphaPoint
from .errors import ConfigError
from .sparsify import SparsifiedModel, alpha_set


@dataclass(frozen=True)
class SweepSettings:
    """What the outcomes depend on; ``alphas`` ascend and start with 0."""

    alphas: tuple[float, ...]
    attacks: tuple[str, ...]
    budget: Budget
    seed: int
    batch_size: int
    n_classes: int


@dataclass(frozen=True)
class SweepPoint:
    """One alpha: which held-out examples it classifies correctly, clean and under every attack. (n,) bool each."""

    alpha: float
    clean: Tensor
    robust: Tensor

    def for_curve(self) -> AlphaPoint:
        """Accuracies with standard errors."""
        return AlphaPoint(self.alpha, accuracy_of(self.clean), accuracy_of(self.robust))

    def to_report(self, base: "SweepPoint") -> dict[str, Any]:
        """Fractions, with the paired difference from alpha = 0."""
        row: dict[str, Any] = {"alpha": self.alpha}
        for name, mine, theirs in (("clean", self.clean, base.clean), ("robust", self.robust, base.robust)):
            accuracy, gain = accuracy_of(mine), paired_difference(mine, theirs)
            row |= {
                f"{name}_accuracy": accuracy.fraction,
                f"{name}_standard_error": accuracy.standard_error,
                f"{name}_minus_base": gain.difference,
                f"{name}_minus_base_standard_error": gain.standard_error,
            }
        return row


@dataclass(frozen=True)
class Choice:
    """The chosen alpha, the rule in words, and why it fell on this one."""

    alpha: float
    rule: str
    reason: str


def grid_of(alphas: Sequence[float]) -> tuple[float, ...]:
    """The alphas to score: ascending, without repeats, and with 0 as the baseline."""
    grid = tuple(sorted({0.0, *alphas}))
    if len(grid) < 2:
        raise ConfigError("the grid holds no alpha above 0", hint="for example --alphas 0.05:0.5:0.05")
    return grid


def sweep_alphas(
    model: SparsifiedModel,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    settings: SweepSettings,
    *,
    state_folder: Path,
    fingerprint: dict[str, Any],
    on_begin: Callable[[float, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_point: Callable[[list[SweepPoint]], None] | None = None,
) -> list[SweepPoint]:
    """Score every alpha on ``x`` (n, channels, height, width) in [0, 1], ``y`` (n,).

    Finished alphas are read back from ``state_folder`` where ``fingerprint`` and the settings are the same.
    """
    key = fingerprint | {
        "attacks": list(settings.attacks), "seed": settings.seed, "batch_size": settings.batch_size, "n": len(y)
    }  # fmt: skip
    points: list[SweepPoint] = []
    for alpha in settings.alphas:
        file = state_folder / f"alpha-{alpha:.6g}.pt"
        point = _saved_point(file, alpha, key)
        if point is None:
            if on_begin is not None:
                on_begin(alpha, len(y) * len(settings.attacks))
            point = _score(model, x, y, indices, alpha, settings, on_progress)
            save_torch(file, {"key": key, "alpha": alpha, "clean": point.clean, "robust": point.robust})
        points.append(point)
        if on_point is not None:
            on_point(points)
    return points


def choose_alpha(points: Sequence[SweepPoint], *, max_clean_drop: float) -> Choice:
    """Highest robust accuracy among the alphas whose clean accuracy falls by at most ``max_clean_drop`` (a fraction).

    Ties go to the smaller alpha. ``points[0]`` is alpha = 0.
    """
    rule = (
        "highest robust accuracy on the held-out split among the alphas whose clean accuracy falls by at most "
        f"{100 * max_clean_drop:g} points from alpha = 0; ties to the smaller alpha"
    )
    base = points[0]
    lowest = float(base.clean.double().mean()) - max_clean_drop - 1e-12
    allowed = [p for p in points if float(p.clean.double().mean()) >= lowest]
    best = max(allowed, key=lambda p: (int(p.robust.sum()), -p.alpha))
    gain, drop = paired_difference(best.robust, base.robust), paired_difference(best.clean, base.clean)
    reason = (
        f"alpha = {best.alpha:g}: robust {percent(accuracy_of(best.robust).fraction)} % "
        f"({percent(gain.difference, gain.standard_error, signed=True)} points against alpha = 0), clean "
        f"{percent(drop.difference, signed=True)} points; {len(points) - len(allowed)} alphas cost too much clean accuracy"
    )
    return Choice(best.alpha, rule, reason)


def show_sweep(points: Sequence[SweepPoint], settings: SweepSettings, chosen: float | None) -> Table:
    """The sweep so far, as people read it."""
    table = Table(title=f"held-out split, {', '.join(settings.attacks)} (± standard error; differences are paired)", title_justify="left")  # fmt: skip
    for column in ("alpha", "clean %", "robust %", "clean - base", "robust - base"):
        table.add_column(column, justify="right")
    for point in points:
        clean, robust = accuracy_of(point.clean), accuracy_of(point.robust)
        cost, gain = paired_difference(point.clean, points[0].clean), paired_difference(point.robust, points[0].robust)
        is_base = point.alpha == 0
        table.add_row(
            f"{point.alpha:g}", percent(clean.fraction, clean.standard_error), percent(robust.fraction, robust.standard_error),
            "" if is_base else percent(cost.difference, cost.standard_error, signed=True),
            "" if is_base else percent(gain.difference, gain.standard_error, signed=True),
            style="bold green" if point.alpha == chosen else None,
        )  # fmt: skip
    return table


def _score(
    model: SparsifiedModel, x: Tensor, y: Tensor, indices: Tensor, alpha: float, settings: SweepSettings,
    on_progress: Callable[[int], None] | None,
) -> SweepPoint:  # fmt: skip
    with alpha_set(model, alpha):
        with torch.no_grad():
            parts = [model(part).argmax(1) for part in x.split(settings.batch_size)]
        clean = torch.cat(parts) == y
        robust = clean.clone()
        for name in settings.attacks:
            left = robust.nonzero().flatten()
            if on_progress is not None:
                on_progress(len(y) - len(left))
            if not len(left):
                continue
            result = run_attack(
                name, model, x[left], y[left], indices[left.cpu()], budget=settings.budget, seed=settings.seed,
                batch_size=settings.batch_size, n_classes=settings.n_classes, on_progress=on_progress,
            )  # fmt: skip
            robust[left[result.broken.to(left.device)]] = False
    return SweepPoint(alpha, clean.cpu(), robust.cpu())


def _saved_point(file: Path, alpha: float, key: dict[str, Any]) -> SweepPoint | None:
    if not file.exists():
        return None
    state = load_torch(file)
    if state["key"] != key or state["alpha"] != alpha:
        return None
    return SweepPoint(alpha, state["clean"], state["robust"])
