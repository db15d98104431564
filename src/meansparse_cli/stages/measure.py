"""``meansparse measure``: many alphas, sites and eps on one split, under plain and BPDA attacks. Nothing is
chosen.

    measure   model, statistics, a split   -> measurements/<name>/measure.yaml, outcomes.npz

All variants (an alpha at each site of a rule) of one eps go through the attacks as one stream and share a pool of
adversarial images, as in ``sweep-alpha`` (``grid``). Rows of the report: a base row, alpha = 0, for each eps, then a
row for each rule of sites and alpha. ``outcomes.npz``: ``index`` and ``label`` (n,); ``clean``, ``plain``, ``bpda``
and ``worst`` (rows, n) bool, still classified correctly. ``--attack none``: the clean images alone, one forward pass
each.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..attacks.problem import Problem
from ..data.examples import Examples
from ..engine.grid import Variant, VariantGrid
from ..files import write_bytes
from ..operator.checkpoint import Checkpoint, load_checkpoint
from ..reporting.console import console, is_wide, note
from ..reporting.sweep_tables import measurement_table
from ..runs.context import RunContext
from ..runs.operators import open_grid, operator_options, problem_of, split_note
from ..selection.choice import SweepPoint
from ..selection.sweep import families_of, in_full, point_of
from ..selection.variants import BASE, site_rules_of, variants_of
from ..settings.stages import MeasureConfig
from ..settings.values import eps_grid, eps_value
from .gather import begin_anew, forget_shards, gather_blocks, say_begun, score_blocks, score_shard, shard_done
from .plan import plan_grid

MEASURES = ("clean", "plain", "bpda", "worst")
NO_ATTACK = ("none",)

Points = dict[tuple[str, float], SweepPoint]
"""(rule, alpha) -> what became of it."""


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

    def outcomes_npz(self, examples: Examples) -> bytes:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: np.stack(rows) for name, rows in self.outcomes.items()}
        np.savez_compressed(buffer, index=examples.indices.numpy(), label=examples.y.cpu().numpy(), **arrays)
        return buffer.getvalue()


def measure(config: MeasureConfig, sources: dict[str, str], *, fresh: bool = False) -> Path | None:
    """Clean, plain, BPDA and worst-case outcomes of every variant on the first ``n_examples`` of a split."""
    context = RunContext("measure", config, sources, fresh=fresh)
    families = _settle(context)
    if done := context.done(whole=True):
        return done
    if line := split_note(context.config.split):
        note(line)
    if context.config.plan:
        work = _begin(context, families)
        plan_grid(context, next(work.grids())[1], work.wanted, len(work.each_eps))
        return None
    if context.config.shard is not None:
        say_begun(context)
        return _shard(_begin(context, families))
    if fresh:
        begin_anew(context.whole, "measure")
    return _whole(_begin(context, families))


@dataclass(frozen=True)
class _Work:
    """``problem`` is that of the first of ``each_eps``; ``families``: plain and BPDA attacks."""

    context: RunContext[MeasureConfig]
    families: tuple[tuple[str, ...], tuple[str, ...]]
    examples: Examples
    checkpoint: Checkpoint
    problem: Problem
    each_eps: tuple[str, ...]
    variants: dict[tuple[str, float], Variant]

    @property
    def wanted(self) -> list[Variant]:
        return list(dict.fromkeys(self.variants.values()))

    def grids(self) -> Iterator[tuple[str, VariantGrid]]:
        """Each eps with its cells, those that are on disk read back."""
        context, problem = self.context, self.problem
        images = f"{context.named_dataset} {context.config.split}"
        key = {"options": self.checkpoint.options_id(), "images": images, "precision": str(problem.precision)}
        for eps in self.each_eps:
            problem = replace(problem, budget=replace(problem.budget, eps=eps_value(eps)))
            yield eps, open_grid(context, problem, self.examples, self.families, context.whole.paths.state, **key)

    def is_missing(self, grid: VariantGrid, b: int) -> bool:
        return grid.count_missing(b, in_full(self.wanted)) > 0


def _begin(context: RunContext[MeasureConfig], families: tuple[tuple[str, ...], tuple[str, ...]]) -> _Work:
    config = context.config
    examples = context.examples(context.take(config.split, config.n_examples))
    statistics = load_checkpoint(context.run.paths.statistics)
    checkpoint = replace(statistics, **operator_options(config))
    each_eps = eps_grid(str(config.eps)) if families[0] else (str(config.eps),)
    problem = problem_of(context, checkpoint, examples, each_eps[0], precision=config.precision)
    sites = checkpoint.active
    variants = variants_of(site_rules_of(config.sites, sites), config.alphas, sites)
    return _Work(context, families, examples, checkpoint, problem, each_eps, variants)


def _shard(work: _Work) -> Path:
    n_images, n_left = 0, len(work.each_eps)
    for eps, grid in work.grids():
        n_images = score_shard(work.context, grid, work.wanted, f"eps {eps}, ", n_grids=n_left)
        n_left -= 1
    return shard_done(work.context, n_images, len(work.examples))


def _whole(work: _Work) -> Path:
    context, (plain, bpda) = work.context, work.families
    found = _Found(outcomes={name: [] for name in (MEASURES if plain else ("clean",))})
    for eps, grid in work.grids():
        gather_blocks(context, grid.blocks, partial(work.is_missing, grid))
        further = len(grid) * (len(work.each_eps) - work.each_eps.index(eps) - 1)
        score_blocks(grid, work.wanted, range(len(grid.blocks)), f"eps {eps}, ", further=further)
        points = {at: point_of(grid, variant, at[1]) for at, variant in work.variants.items()}
        if not plain:
            none = next(iter(points.values())).clean[:0]  # no curves of attacks that were not run
            points = {at: replace(point, plain=none, bpda=none, worst=none) for at, point in points.items()}
        found.add(eps, points, grid.passes())
        _show(context, found, eps, plain)
    outcomes = context.place.paths.outcomes
    write_bytes(outcomes, found.outcomes_npz(work.examples))
    results = {
        "n_examples": len(work.examples),
        "split": context.config.split,
        "attacks": list(plain),
        "bpda_attacks": list(bpda),
        "model": context.run.source.name,
        "precision": work.problem.precision,
        "rows": found.rows,
        **found.passes,
    }
    path = context.write([outcomes], results)
    forget_shards(context.whole, "measure")
    return path


def _settle(context: RunContext[MeasureConfig]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fill in every default; plain and BPDA attacks."""
    context.verified("calibrate")
    config = context.config
    families = ((), ()) if config.attack == NO_ATTACK else families_of(config.attack, "")
    eps = context.eps_of(config.eps) if families[0] else "0"
    images = context.take(config.split, config.n_examples)
    alphas = tuple(sorted({alpha for alpha in config.alphas if alpha}))
    context.settle("calibrate", images, families, eps=eps, alphas=alphas, n_examples=len(images))
    return families


def _show(context: RunContext[MeasureConfig], found: _Found, eps: str, plain: tuple[str, ...]) -> None:
    rows, config = [row for row in found.rows if row["eps"] == eps], context.config
    results = {"rows": rows, "split": config.split, "attacks": list(plain), "n_examples": config.n_examples}
    table = measurement_table(results, with_errors=is_wide())
    title = f"{context.run.source.name}: {table.title}" + (f", {context.run.norm} {eps}" if plain else "")
    console.print(replace(table, title=title).to_rich())
