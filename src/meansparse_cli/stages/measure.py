"""``meansparse measure``: many alphas, sites and eps on one split, under plain and BPDA attacks. Nothing is
chosen.

    measure   model, statistics, a split   -> measurements/<name>/measure.yaml, outcomes.npz

All variants (an alpha at each site of a rule) of one eps go through the attacks as one stream and share a pool of
adversarial images, as in ``sweep-alpha`` (``grid``). Rows of the report: a base row, alpha = 0, for each eps, then a
row for each rule of sites and alpha. ``outcomes.npz``: ``index`` and ``label`` (n,); ``clean``, ``plain``, ``bpda``
and ``worst`` (rows, n) bool, still classified correctly. ``--attack none``: the clean images alone, one forward pass
each.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..attacks.problem import Problem
from ..data.examples import Examples
from ..data.identity import content_id
from ..data.splits import Split
from ..engine.grid import Variant, VariantGrid
from ..engine.outcomes import attacks_id
from ..files import discard, sha256_of, write_bytes
from ..operator.checkpoint import load_checkpoint
from ..reporting.console import console, is_wide, live, note
from ..reporting.sweep_tables import measurement_table
from ..runs.checks import split_note
from ..runs.context import RunContext
from ..runs.operators import problem_of
from ..selection.choice import SweepPoint
from ..selection.sweep import families_of, in_full, point_of
from ..selection.variants import BASE, site_rules_of, variants_of
from ..settings.stages import MeasureConfig
from ..settings.values import eps_grid, eps_value

MEASURES = ("clean", "plain", "bpda", "worst")
NO_ATTACK = ("none",)

Points = dict[tuple[str, float], SweepPoint]
"""(rule, alpha) -> what became of it."""


@dataclass(frozen=True)
class _Asked:
    """What a measurement is asked for; ``config`` with every default filled in."""

    config: MeasureConfig
    eps: str
    plain: tuple[str, ...]
    bpda: tuple[str, ...]
    images: Split
    inputs: dict[str, str]


@dataclass
class _Found:
    """Rows of the report and of ``outcomes.npz``, in step."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[str, list[Any]] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=lambda: {"forward_passes": 0, "backward_passes": 0})

    def add(self, eps: str, points: Points, passes: dict[str, int]) -> None:
        """What became of every rule and alpha at one eps."""
        for (rule, _), point in points.items():
            self.rows.append({"eps": eps, "sites": rule, **point.to_report(points[BASE])})
            for name, rows in self.outcomes.items():
                rows.append(getattr(point, name).numpy())
        self.passes = {key: self.passes[key] + value for key, value in passes.items()}


def measure(config: MeasureConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Clean, plain, BPDA and worst-case outcomes of every variant on the first ``n_examples`` of a split."""
    context = RunContext("measure", config, sources, fresh=fresh)
    asked = _asked(context, config)
    if done := context.done(asked.config, asked.inputs):
        return done

    if line := split_note(config.split):
        note(line)
    examples = context.examples(asked.images).to(context.device)
    statistics = load_checkpoint(context.run.paths.statistics)
    checkpoint = replace(statistics, centre=config.centre, spread=config.spread)
    each_eps = eps_grid(asked.eps) if asked.plain else (asked.eps,)
    problem = problem_of(context, checkpoint, examples, each_eps[0], precision=config.precision)
    sites = checkpoint.active
    variants = variants_of(site_rules_of(config.sites, sites), asked.config.alphas, sites)
    if fresh:
        discard(context.place.paths.state)
    found = _Found(outcomes={name: [] for name in (MEASURES if asked.plain else ("clean",))})
    for eps in each_eps:
        problem = replace(problem, budget=replace(problem.budget, eps=eps_value(eps)))
        grid = _open_grid(context, asked, problem, examples, checkpoint.options_id())
        points = _score(grid, variants, f"eps {eps}")
        if not asked.plain:
            points = {key: _clean_alone(point) for key, point in points.items()}
        found.add(eps, points, grid.passes())
        _show(context, asked, found, eps)
    return _write(context, asked, examples, found, problem.precision)


def _asked(context: RunContext, config: MeasureConfig) -> _Asked:
    context.verified("calibrate")
    plain, bpda = ((), ()) if config.attack == NO_ATTACK else families_of(config.attack, "")
    eps = context.eps_of(config.eps) if plain else "0"
    images = context.take(config.split, config.n_examples)
    inputs = context.input("calibrate") | {"images": content_id(images), "attacks": attacks_id((*plain, *bpda))}
    alphas = tuple(sorted({alpha for alpha in config.alphas if alpha}))
    update = {"eps": eps, "norm": context.run.norm, "alphas": alphas, "n_examples": len(images)}
    return _Asked(config.model_copy(update=update), eps, plain, bpda, images, inputs)


def _open_grid(context: RunContext, asked: _Asked, problem: Problem, examples: Examples, options: str) -> VariantGrid:
    """Every cell that this measurement, or one before it, has scored at one eps."""
    config = asked.config
    return VariantGrid(
        problem,
        examples,
        plain=asked.plain,
        bpda=asked.bpda,
        folder=context.place.paths.state,
        block_size=config.block_size,
        key={
            "statistics": sha256_of(context.run.paths.statistics),
            "weights": context.weights_id,
            "options": options,
            "precision": problem.precision,
            "images": f"{context.named_dataset} {config.split}",
        },
    )


def _write(context: RunContext, asked: _Asked, examples: Examples, found: _Found, precision: str | None) -> Path:
    """``outcomes.npz`` and ``measure.yaml``."""
    config, place = asked.config, context.place.paths
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.stack(rows) for name, rows in found.outcomes.items()}
    np.savez_compressed(buffer, index=examples.indices.numpy(), label=examples.y.cpu().numpy(), **arrays)
    write_bytes(place.outcomes, buffer.getvalue())
    results = {
        "n_examples": len(examples),
        "split": config.split,
        "attacks": list(asked.plain),
        "bpda_attacks": list(asked.bpda),
        "model": context.run.source.name,
        "precision": precision,
        "rows": found.rows,
        **found.passes,
    }
    return context.write(config, asked.inputs, [place.outcomes], results)


def _score(grid: VariantGrid, variants: dict[tuple[str, float], Variant], what: str) -> Points:
    wanted = list(dict.fromkeys(variants.values()))
    with live("pairs") as view:
        grid.tell(view.begin, view.advance)
        grid.classify(wanted)
        for b in range(len(grid.blocks)):
            grid.score(b, in_full(wanted), f"{what}, ")
    return {key: point_of(grid, variant, key[1]) for key, variant in variants.items()}


def _clean_alone(point: SweepPoint) -> SweepPoint:
    """Without the curves of attacks that were not run."""
    return replace(point, plain=point.clean[:0], bpda=point.clean[:0], worst=point.clean[:0])


def _show(context: RunContext, asked: _Asked, found: _Found, eps: str) -> None:
    """What was measured at one eps."""
    rows = [row for row in found.rows if row["eps"] == eps]
    results = {"rows": rows, "split": asked.config.split, "attacks": list(asked.plain), "n_examples": len(asked.images)}
    table = measurement_table(results, with_errors=is_wide())
    title = f"{context.run.source.name}: {table.title}" + (f", {context.run.norm} {eps}" if asked.plain else "")
    console.print(replace(table, title=title).to_rich())
