"""``meansparse sweep-alpha``: accuracies at each alpha on held-out images, plain and BPDA; the choice of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attacks.problem import Problem
from ..data.examples import Examples
from ..data.identity import content_id
from ..data.splits import Split
from ..engine.grid import VariantGrid
from ..engine.outcomes import attacks_id
from ..files import discard, sha256_of
from ..operator.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..reporting.console import console, live, note
from ..reporting.curves import draw_alpha_curve
from ..reporting.sweep_tables import say_sweep, show_sweep
from ..runs.checks import check_disjoint
from ..runs.context import RunContext
from ..runs.operators import problem_of, with_options
from ..selection.choice import ChoiceRule
from ..selection.rules import alphas_by_rule
from ..selection.search import check_blocks
from ..selection.sweep import Sweep, SweepSettings, families_of, grid_of, sweep_alphas
from ..settings.stages import SweepAlphaConfig


@dataclass(frozen=True)
class _Asked:
    """What a sweep is asked for; ``config`` with every default filled in."""

    config: SweepAlphaConfig
    eps: str
    plain: tuple[str, ...]
    bpda: tuple[str, ...]
    images: Split
    inputs: dict[str, str]


def sweep_alpha(config: SweepAlphaConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """``meansparse.safetensors``, the curve and ``sweep-alpha.yaml``."""
    context = RunContext("sweep-alpha", config, sources, fresh=fresh)
    asked = _asked(context, config)
    if done := context.done(asked.config, asked.inputs):
        return done

    examples = context.examples(asked.images).to(context.device)
    checkpoint = with_options(load_checkpoint(context.run.paths.statistics), config)
    if fresh:
        discard(context.run.paths.state / "sweep-alpha")
    problem = problem_of(context, checkpoint, examples, asked.eps, precision=config.precision)
    grid = _open_grid(context, asked, problem, examples, checkpoint.options_id())
    sweep, chosen, by_rule = _sweep(asked, grid, checkpoint)

    run = context.run
    save_checkpoint(run.paths.checkpoint, chosen)
    results = sweep.to_report() | {
        "alpha": chosen.alpha,
        "alpha_rule": config.alpha_rule,
        "n_examples": len(examples),
        "attacks": list(asked.plain),
        "bpda_attacks": list(asked.bpda),
        "precision": problem.precision,
        "estimator": context.report("calibrate")["results"]["estimator"],
        **by_rule,
        **grid.passes(),
    }
    title = f"{run.source.name}: {len(examples):,} held-out images, {run.norm} {asked.eps}"
    draw_alpha_curve(results, title=title, png=run.paths.curve_png, svg=run.paths.curve_svg)
    note(f"curve: {run.paths.curve_png}")
    return context.write(asked.config, asked.inputs, [run.paths.checkpoint], results)


def _asked(context: RunContext, config: SweepAlphaConfig) -> _Asked:
    context.verified("calibrate")
    eps = context.eps_of(config.eps)
    plain, bpda = families_of(config.attack, config.objective)
    alphas, changes = grid_of(config.alphas)
    if changes and context.sources.get("alphas") != "default":
        note(f"alphas: {changes}: {', '.join(f'{alpha:g}' for alpha in alphas)}")
    check_disjoint(context)
    images = context.take("held-out", config.n_examples, clamp=context.sources.get("n_examples") == "default")
    inputs = context.input("calibrate") | {"images": content_id(images), "attacks": attacks_id((*plain, *bpda))}
    update = {"eps": eps, "norm": context.run.norm, "alphas": alphas, "n_examples": len(images)}
    return _Asked(config.model_copy(update=update), eps, plain, bpda, images, inputs)


def _open_grid(context: RunContext, asked: _Asked, problem: Problem, examples: Examples, options: str) -> VariantGrid:
    """Every cell that this sweep, or one before it, has scored."""
    config, run = asked.config, context.run
    return VariantGrid(
        problem,
        examples,
        plain=asked.plain,
        bpda=asked.bpda,
        folder=run.paths.state / "sweep-alpha",
        block_size=config.block_size,
        key={
            "statistics": sha256_of(run.paths.statistics),
            "weights": context.weights_id,
            "options": options,
            "images": f"{context.named_dataset} held-out",
            # not where it is fp32, so that what a sweep on a CPU began before this was a setting goes on
            **({} if problem.precision == "fp32" else {"precision": problem.precision}),
        },
    )


def _sweep(asked: _Asked, grid: VariantGrid, checkpoint: Checkpoint) -> tuple[Sweep, Checkpoint, dict[str, Any]]:
    """The sweep, the checkpoint that its rule leads to, and what goes into the report about the rule."""
    config, plain = asked.config, asked.plain
    settings = SweepSettings(
        alphas=config.alphas,
        site_weights=(1.0,) * len(grid.sites),
        racing=config.racing,
        n_refine=config.refine,
        rule=ChoiceRule(config.objective, config.max_clean_drop / 100, config.min_gain, plain),
    )
    if config.alpha_rule != "shared":
        check_blocks(len(grid), config.block_size)
    with live("pairs") as view:
        grid.tell(view.begin, view.advance)
        sweep = sweep_alphas(grid, settings, on_points=lambda points: view.show(show_sweep(points, plain, None)))
        view.show(show_sweep(sweep.points, plain, sweep.chosen.alpha))
        sweep, chosen, by_rule = alphas_by_rule(config.alpha_rule, grid, settings, sweep, checkpoint)
        table = show_sweep(sweep.points, plain, sweep.chosen.alpha)
        view.show(table)
    if not console.is_terminal:
        console.print(table)
    say_sweep(sweep, note)
    for line in by_rule.get("in_words", []):
        note(line)
    return sweep, chosen, by_rule
