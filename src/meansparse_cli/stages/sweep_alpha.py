"""``meansparse sweep-alpha``: accuracies at each alpha on held-out images, plain and BPDA; the choice of one."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.examples import Examples
from ..data.identity import image_ids
from ..data.splits import DataSet, SplitName
from ..engine.grid import Variant, VariantGrid, variant_of
from ..errors import ConfigError, DataError
from ..operator.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..reporting.console import LiveView, console, live, note, phase
from ..reporting.curves import draw_alpha_curve
from ..reporting.sweep_tables import say_sweep, show_sweep
from ..runs.context import RunContext
from ..runs.operators import open_grid, problem_of, with_options
from ..selection.choice import ChoiceRule, SweepPoint
from ..selection.learned import N_EPOCHS, N_IMAGES, Lesson, check_learnable
from ..selection.rules import alphas_by_rule, thresholds_by_rule
from ..selection.search import check_blocks, unseen_blocks
from ..selection.sweep import Sweep, SweepSettings, families_of, grid_of, in_full, sweep_alphas
from ..settings.stages import SweepAlphaConfig
from .gather import begin_anew, forget_shards, gather_blocks, say_begun, score_shard, shard_done, shards_begun
from .plan import plan_grid

BY_WORKERS = "by_workers"
"""In a report whose alphas several workers scored: all of them in full."""


def sweep_alpha(config: SweepAlphaConfig, sources: dict[str, str], *, fresh: bool = False) -> Path | None:
    """``meansparse.safetensors``, the curve and ``sweep-alpha.yaml``."""
    context = RunContext("sweep-alpha", config, sources, fresh=fresh)
    plain, bpda = families = _settle(context)
    if done := context.done(whole=True) or _done_by_workers(context):
        return done

    config, run, folder = context.config, context.run, context.run.paths.state / "sweep-alpha"
    examples = context.examples(context.take("held-out", config.n_examples))
    checkpoint = with_options(load_checkpoint(run.paths.statistics), config)
    if config.shard is not None and not config.plan:
        say_begun(context)
    elif fresh:
        begin_anew(context.whole, "sweep-alpha")
    problem = problem_of(context, checkpoint, examples, str(config.eps), precision=config.precision)
    key = {"options": checkpoint.options_id(), "images": f"{context.named_dataset} held-out"}
    if problem.precision != "fp32":  # so that what a sweep on a CPU began before this was a setting goes on
        key["precision"] = str(problem.precision)
    grid = open_grid(context, problem, examples, families, folder, **key)
    if config.plan:
        plan_grid(context, grid, _variants(config, grid))
        return None
    if config.shard is not None:
        return shard_done(context, score_shard(context, grid, _variants(config, grid)), len(grid))
    wanted = in_full(_variants(config, grid))
    gather_blocks(context, grid.blocks, lambda b: grid.count_missing(b, wanted) > 0)
    settings, sweep, chosen, by_rule = _sweep(config, plain, grid, checkpoint)
    if config.alpha_rule == "learned":
        lesson = Lesson(problem, checkpoint, *_lesson_images(context, grid))
        chosen, by_rule = _learned(context, lesson, grid, settings, chosen, **key)
    for line in by_rule.get("in_words", []):
        note(line)

    save_checkpoint(run.paths.checkpoint, chosen)
    results = sweep.to_report() | {
        "alpha": chosen.alpha,
        "alpha_rule": config.alpha_rule,
        "n_examples": len(examples),
        "attacks": list(plain),
        "bpda_attacks": list(bpda),
        "precision": problem.precision,
        "estimator": context.report("calibrate")["results"]["estimator"],
        **by_rule,
        **grid.passes(),
    }
    if context.sources.get("racing", "default") == "default" and shards_begun(context):
        results[BY_WORKERS] = True
    title = f"{run.source.name}: {len(examples):,} held-out images, {run.norm} {config.eps}"
    draw_alpha_curve(results, title=title, png=run.paths.curve_png, svg=run.paths.curve_svg)
    note(f"curve: {run.paths.curve_png}")
    path = context.write([run.paths.checkpoint], results)
    forget_shards(context.whole, "sweep-alpha")
    return path


def _variants(config: SweepAlphaConfig, grid: VariantGrid) -> list[Variant]:
    """The same alpha at every site, for each alpha."""
    return [variant_of([alpha] * len(grid.sites)) for alpha in config.alphas]


def _settle(context: RunContext[SweepAlphaConfig]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fill in every default; plain and BPDA attacks."""
    context.verified("calibrate")
    config, eps = context.config, context.eps_of(context.config.eps)
    families = families_of(config.attack, config.objective)
    alphas, changes = grid_of(config.alphas)
    if changes and context.sources.get("alphas") != "default":
        note(f"alphas: {changes}: {', '.join(f'{alpha:g}' for alpha in alphas)}")
    _check_disjoint(context)
    if config.alpha_rule == "learned":
        check_learnable(context.run.norm, config.shape)
    images = context.take("held-out", config.n_examples, clamp=context.sources.get("n_examples") == "default")
    context.settle("calibrate", images, families, eps=eps, alphas=alphas, n_examples=len(images))
    if config.racing and (config.shard is not None or (shards_begun(context) and not context.fresh)):
        if context.sources.get("racing") == "flag":
            raise ConfigError("--racing with workers, who score every alpha in full", hint="leave --racing out")
        context.settle("calibrate", images, families, racing=False)  # which would need the images one block by one
    return families


def _done_by_workers(context: RunContext[SweepAlphaConfig]) -> Path | None:
    """The report, if all of this was done by workers, without racing."""
    before = context.report_here() if context.config.racing and not context.fresh else None
    if before is None or not before["results"].get(BY_WORKERS):
        return None
    settled = context.config
    context.config = settled.model_copy(update={"racing": False})
    if done := context.done(whole=True):
        return done
    context.config = settled
    return None


def _check_disjoint(context: RunContext[SweepAlphaConfig]) -> None:
    """Refuse held-out images that are among those of the statistics or of the test split.

    The splits of one data set are disjoint by construction; they need not be where the sweep was given another one.
    """
    config, before = context.config, context.calibrated_with
    if config.dataset is None and config.data_dir is None:
        return
    dataset = before["dataset"] or context.run.source.dataset
    data_dir = Path(before["data_dir"]) if before["data_dir"] else None
    held_out = context.split("held-out")
    if not len(held_out):
        raise DataError("the held-out split is empty", hint="a data set of 10 training images or more has one")
    if (context.named_dataset, config.data_dir or data_dir) == (dataset, data_dir):
        return  # its splits are disjoint files; pictures that a data set holds twice are its authors' affair
    mine, calibrated_with = image_ids(held_out), DataSet(dataset, data_dir)
    others: tuple[SplitName, SplitName] = ("calibration", "test")
    for split in others:
        n = len(mine & image_ids(calibrated_with.split(split)))
        if n:
            raise DataError(
                f"{n} of {len(held_out)} held-out images are in the {split} split that this run was calibrated with",
                hint="sweep on the data set of the statistics (leave out --dataset and --data-dir), or run: "
                f"{context.run.command('calibrate')} with the same --dataset and --data-dir",
            )


def _tell_block(view: LiveView, grid: VariantGrid, ahead: list[int], *, is_all: bool) -> None:
    """Have ``view`` told of the next block; ``ahead``: images of the blocks to come, without the next one afterwards.

    What a block costs goes by its images. What comes after all blocks, unless they are all, cannot be known.
    """
    work = (ahead.pop(0), sum(ahead)) if ahead and is_all else None
    grid.tell(partial(view.begin, work=work), view.advance)


def _sweep(
    config: SweepAlphaConfig, plain: tuple[str, ...], grid: VariantGrid, checkpoint: Checkpoint
) -> tuple[SweepSettings, Sweep, Checkpoint, dict[str, Any]]:
    """The sweep, the checkpoint that its rule leads to, and what goes into the report about the rule."""
    settings = SweepSettings(
        alphas=config.alphas,
        site_weights=(1.0,) * len(grid.sites),
        racing=config.racing,
        n_refine=config.refine,
        rule=ChoiceRule(config.objective, config.max_clean_drop / 100, config.min_gain, plain),
    )
    if config.alpha_rule != "shared":
        check_blocks(len(grid), config.block_size)
    is_all = config.alpha_rule == "shared" and not config.refine
    with live("pairs") as view:
        ahead = [len(block) for block in grid.blocks]
        _tell_block(view, grid, ahead, is_all=is_all)

        def on_points(points: list[SweepPoint]) -> None:
            view.show(show_sweep(points, plain, None))
            _tell_block(view, grid, ahead, is_all=is_all)

        sweep = sweep_alphas(grid, settings, on_points=on_points)
        view.show(show_sweep(sweep.points, plain, sweep.chosen.alpha))
        sweep, chosen, by_rule = alphas_by_rule(config.alpha_rule, grid, settings, sweep, checkpoint)
        table = show_sweep(sweep.points, plain, sweep.chosen.alpha)
        view.show(table)
    if not console.is_terminal:
        console.print(table)
    say_sweep(sweep, note)
    return settings, sweep, chosen, by_rule


def _lesson_images(context: RunContext[SweepAlphaConfig], grid: VariantGrid) -> tuple[Examples, Examples]:
    """Training images to learn on; the held-out images of all blocks that do not judge."""
    judges = unseen_blocks(len(grid.blocks))
    early = torch.cat([block for b, block in enumerate(grid.blocks) if b not in judges])
    return context.examples(context.take("calibration", N_IMAGES, clamp=True)), grid.cells.examples.at(early)


def _learned(
    context: RunContext[SweepAlphaConfig],
    lesson: Lesson,
    grid: VariantGrid,
    settings: SweepSettings,
    shared: Checkpoint,
    **key: str,
) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint that learned thresholds lead to, and what goes into the report about them."""
    start = shared.alpha or min(alpha for alpha in settings.alphas if alpha)
    decisions = grid.decisions("learned", start, N_EPOCHS, lesson.training.indices.tolist())
    with phase("learning", N_EPOCHS * len(lesson.training), "images") as part:
        learned = lesson.learn(start, decisions, part.advance)
    problem = lesson.problem_of(learned.checkpoint)
    key |= {"options": learned.checkpoint.options_id()}
    families = grid.attacks["plain"], grid.attacks["bpda"]
    theirs = open_grid(context, problem, grid.cells.examples, families, grid.ledger.folder.parent, **key)
    with live("pairs") as view:
        theirs.tell(view.begin, view.advance)
        return thresholds_by_rule(learned, theirs, grid, settings, shared)
