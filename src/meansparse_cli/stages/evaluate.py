"""``meansparse evaluate``: base and sparsified model under the same attacks, judged afresh.

    evaluate   model, statistics, alpha, a split   -> outcomes.npz, evaluate.yaml

In order: what was asked for and what is there already; every attack on every example; the sanity checks, whose own
breaks count as well; the report.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..attacks import expand_attacks
from ..attacks.problem import search_form
from ..data.identity import content_id
from ..diagnostics import Diagnosis
from ..engine.comparison import Evaluation, eps_rows, headline_eps
from ..engine.image_files import read_pool
from ..engine.outcomes import attacks_id
from ..files import discard, sha256_of, write_bytes
from ..ledger import recorded
from ..models.published import published_note, published_results
from ..reporting.console import console, is_wide, note
from ..reporting.curves import draw_eps_curve
from ..reporting.evaluation_tables import eps_table, show_diagnostics, show_evaluation
from ..runs.checks import split_note
from ..runs.context import RunContext
from ..runs.operators import alpha_in_use, checkpoint_to_evaluate, problem_of
from ..settings.shard import read_shard
from ..settings.stages import EvaluateConfig
from ..settings.values import eps_grid
from .evaluate_work import Asked, Work


def evaluate(config: EvaluateConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Base and sparsified model under the same attacks on the same images, test images by default, judged afresh."""
    context = RunContext("evaluate", config, sources, fresh=fresh)
    asked = _asked(context, config)
    if done := _done(context, asked):
        return done

    work = _begin(context, asked)
    runs = work.attack()
    allowed = work.allowed(asked.pool)
    diagnosis = None
    if asked.config.doubts:
        diagnosis = work.diagnose(runs[work.eps].evaluation())
        for run in runs.values():  # everything that is known to break an example counts
            run.try_pool(diagnosis.images)
        allowed |= work.allowed(diagnosis.images)
    evaluations = {eps: run.evaluation() for eps, run in runs.items()}
    results = _shown(work, evaluations[work.eps], diagnosis, allowed)
    outputs = [context.place.paths.outcomes]
    if asked.config.save_witnesses:
        outputs += work.save_witnesses(runs)
    if len(work.grid) > 1:
        results["eps_curve"] = eps_rows(evaluations)
        _show_eps_curve(work, results)
    if asked.shard is not None:
        results["n_state_files"] = len(asked.shard.files_in(work.state_folder))
    # late: until here the report before still has its own
    write_bytes(context.place.paths.outcomes, evaluations[work.eps].outcomes_npz())
    return context.write(asked.config, asked.inputs, outputs, results)


def _asked(context: RunContext, config: EvaluateConfig) -> Asked:
    shard = None if config.shard is None else read_shard(config.shard)
    if shard is not None:
        config = config.model_copy(update={"doubts": False, "save_witnesses": False, "pool": ()})
    alpha, upstream = alpha_in_use(context, config.alpha)
    eps, attacks = context.eps_of(config.eps), tuple(expand_attacks(config.attack))
    images = context.take(config.split, config.n_examples, shard=shard)
    indices = torch.tensor(list(images.indices))
    pool = read_pool(config.pool, context.split(config.split), indices) if config.pool else {}
    inputs = context.input(upstream) | {"images": content_id(images), "attacks": attacks_id(attacks)}
    inputs |= {f"pool {number}, {file.name}": sha256_of(file) for number, file in enumerate(config.pool, start=1)}
    update: dict[str, Any] = {"eps": eps, "norm": context.run.norm, "alpha": alpha}
    if shard is None:
        update["n_examples"] = len(images)
    checkpoint = checkpoint_to_evaluate(context, config, upstream)
    return Asked(config.model_copy(update=update), shard, alpha, eps, attacks, checkpoint, images, pool, inputs)


def _done(context: RunContext, asked: Asked) -> Path | None:
    """The report, if all of this was done already; that of a shard is of no use without the files it wrote."""
    path = context.place.paths.report("evaluate")
    if asked.shard is not None and not context.fresh and path.exists():
        folder = context.whole.paths.state / "evaluate"
        n_there = len(asked.shard.files_in(folder))
        n_gone = context.report_here()["results"].get("n_state_files", 0) - n_there
        if n_gone > 0:
            shard = asked.config.shard
            note(f"evaluate: {n_gone} of the files that shard {shard} wrote into {folder} are gone: done again")
            return None
    return context.done(asked.config, asked.inputs)


def _begin(context: RunContext, asked: Asked) -> Work:
    """The model and the examples on the device; with ``--fresh``, what was done before is thrown away."""
    config, run = asked.config, context.run
    if line := split_note(config.split):
        note(line)
    examples = context.examples(asked.images).to(context.device)
    grid = eps_grid(asked.eps)
    eps = headline_eps(grid, run.source.dataset, run.norm)
    state_folder = context.whole.paths.state / "evaluate"
    begun = None if context.fresh and asked.shard is None else recorded(state_folder, "precision")
    precision = config.precision or begun
    problem = problem_of(context, asked.checkpoint, examples, eps, alpha=asked.alpha, precision=precision)
    is_faster = context.device == "cpu" or problem.precision != "fp32"
    channels_last = is_faster if config.channels_last is None else config.channels_last
    form = search_form(problem.model, compile=config.compile, channels_last=channels_last)
    problem = replace(problem, search_model=form)
    work = Work(context, asked, problem, examples, grid, eps, channels_last)
    for name, n_allowed in work.allowed(asked.pool).items():
        note(
            f"pool: {len(asked.pool[name]):,} images of {name} are of these {len(examples):,} examples, "
            f"{n_allowed:,} inside the budget"
        )
    if context.fresh:
        _discard(work)
    return work


def _discard(work: Work) -> None:
    if work.asked.shard is not None:
        for file in work.asked.shard.files_in(work.state_folder):  # what the others wrote stays
            file.unlink()
        return
    discard(work.state_folder)
    discard(work.context.whole.paths.folder / "shards")  # reports about what is gone now


def _shown(work: Work, evaluation: Evaluation, diagnosis: Diagnosis | None, allowed: dict[str, int]) -> dict[str, Any]:
    """The results for the report, once they are on the screen."""
    asked, run = work.asked, work.context.run
    results = evaluation.to_report()
    part = "" if asked.shard is None else f" (shard {asked.config.shard})"
    console.print(show_evaluation(results, f"{work.title(part)}, {run.norm} {work.eps}", with_interval=is_wide()))
    if asked.shard is not None:
        note("a shard: the same command without --shard gathers them all, asks the doubts and saves witnesses")
    published = published_results(run.source)
    if line := published_note(published):
        note(line)
    if diagnosis is not None:
        results["doubts"] = [one.to_report() for one in diagnosis.diagnostics]
        console.print(show_diagnostics(results))
    return (
        results
        | published
        | {
            "eps": work.eps,
            "operator": asked.operator,
            "pool": allowed,
            "site_alphas": asked.checkpoint.site_alphas(asked.alpha),
            "search": {
                "precision": work.problem.precision,
                "compile": asked.config.compile,
                "channels_last": work.channels_last,
            },
        }
    )


def _show_eps_curve(work: Work, results: dict[str, Any]) -> None:
    """Table and curve of a grid of budgets."""
    folder = work.context.place.paths.folder
    console.print(eps_table(results, with_clean=True).to_rich())
    draw_eps_curve(
        results,
        norm=work.context.run.norm,
        title=f"{work.title()}, worst case",
        png=folder / "eps-curve.png",
        svg=folder / "eps-curve.svg",
    )
    note(f"curve: {folder / 'eps-curve.png'}")
