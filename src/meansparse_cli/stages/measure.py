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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.examples import Examples
from ..engine.grid import Variant, VariantGrid
from ..files import discard, write_bytes
from ..operator.checkpoint import load_checkpoint
from ..reporting.console import console, is_wide, live, note
from ..reporting.sweep_tables import measurement_table
from ..runs.context import RunContext
from ..runs.operators import open_grid, problem_of, split_note
from ..selection.choice import SweepPoint
from ..selection.sweep import families_of, in_full, point_of
from ..selection.variants import BASE, site_rules_of, variants_of
from ..settings.stages import MeasureConfig
from ..settings.values import eps_grid, eps_value

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


def measure(config: MeasureConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Clean, plain, BPDA and worst-case outcomes of every variant on the first ``n_examples`` of a split."""
    context = RunContext("measure", config, sources, fresh=fresh)
    plain, bpda = families = _settle(context)
    if done := context.done():
        return done

    config, place = context.config, context.place.paths
    if line := split_note(config.split):
        note(line)
    examples = context.examples(context.take(config.split, config.n_examples)).to(context.device)
    statistics = load_checkpoint(context.run.paths.statistics)
    checkpoint = replace(statistics, centre=config.centre, spread=config.spread)
    each_eps = eps_grid(str(config.eps)) if plain else (str(config.eps),)
    problem = problem_of(context, checkpoint, examples, each_eps[0], precision=config.precision)
    sites = checkpoint.active
    variants = variants_of(site_rules_of(config.sites, sites), config.alphas, sites)
    if fresh:
        discard(place.state)
    key = {"options": checkpoint.options_id(), "images": f"{context.named_dataset} {config.split}"}
    key["precision"] = str(problem.precision)
    found = _Found(outcomes={name: [] for name in (MEASURES if plain else ("clean",))})
    for eps in each_eps:
        problem = replace(problem, budget=replace(problem.budget, eps=eps_value(eps)))
        grid = open_grid(context, problem, examples, families, place.state, **key)
        points = _score(grid, variants, eps, each_eps)
        if not plain:
            none = next(iter(points.values())).clean[:0]  # no curves of attacks that were not run
            points = {at: replace(point, plain=none, bpda=none, worst=none) for at, point in points.items()}
        found.add(eps, points, grid.passes())
        _show(context, found, eps, plain)
    write_bytes(place.outcomes, found.outcomes_npz(examples))
    results = {
        "n_examples": len(examples),
        "split": config.split,
        "attacks": list(plain),
        "bpda_attacks": list(bpda),
        "model": context.run.source.name,
        "precision": problem.precision,
        "rows": found.rows,
        **found.passes,
    }
    return context.write([place.outcomes], results)


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


def _score(
    grid: VariantGrid, variants: dict[tuple[str, float], Variant], eps: str, each_eps: tuple[str, ...]
) -> Points:
    wanted = list(dict.fromkeys(variants.values()))
    with live("pairs") as view:
        grid.classify(wanted)
        n_after = len(grid) * (len(each_eps) - each_eps.index(eps))
        for b, block in enumerate(grid.blocks):
            n_after -= len(block)
            grid.tell(partial(view.begin, work=(len(block), n_after)), view.advance)
            grid.score(b, in_full(wanted), f"eps {eps}, ")
    return {key: point_of(grid, variant, key[1]) for key, variant in variants.items()}


def _show(context: RunContext[MeasureConfig], found: _Found, eps: str, plain: tuple[str, ...]) -> None:
    rows, config = [row for row in found.rows if row["eps"] == eps], context.config
    results = {"rows": rows, "split": config.split, "attacks": list(plain), "n_examples": config.n_examples}
    table = measurement_table(results, with_errors=is_wide())
    title = f"{context.run.source.name}: {table.title}" + (f", {context.run.norm} {eps}" if plain else "")
    console.print(replace(table, title=title).to_rich())
