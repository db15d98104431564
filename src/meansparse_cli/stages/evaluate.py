"""``meansparse evaluate``: base and sparsified model under the same attacks, judged afresh.

In order: what was asked for and is there already; every attack on every example; the sanity checks, whose own breaks
count as well; the report.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..attacks import expand_attacks
from ..attacks.problem import Budget, Problem, search_form
from ..data.examples import Examples
from ..data.splits import Split
from ..diagnostics import DIAGNOSTICS_COST, DOUBTS_VERSION, Diagnostic, KeptAnswers, diagnose
from ..engine.cells import Cells, FoundImages
from ..engine.comparison import Evaluation, eps_rows, headline_eps
from ..engine.evaluate import EvaluationRun, Plan
from ..engine.image_files import read_pool
from ..engine.in_python import check_draws
from ..engine.state import StateFolder, eps_state_folder
from ..files import discard, sha256_of, write_bytes
from ..ledger import recorded
from ..models.published import published_note, published_results
from ..operator.checkpoint import Checkpoint
from ..operator.defence import DefendedModel
from ..reporting.console import console, is_wide, live, note
from ..reporting.curves import draw_eps_curve
from ..reporting.evaluation_tables import (
    distances_table,
    eps_table,
    evaluation_notes,
    show_attacks,
    show_diagnostics,
    show_evaluation,
)
from ..runs.context import RunContext
from ..runs.defence import ALPHA, NamedDefence, defence_of
from ..runs.operators import alpha_in_use, checkpoint_to_evaluate, problem_of, split_note, swept_alpha
from ..settings.shard import Shard, read_shard
from ..settings.stages import EvaluateConfig
from ..settings.values import eps_grid, eps_value
from .extras import find_eps, keep_witnesses
from .gather import begin_shard, missing_shards, shards_begun
from .plan import plan_evaluation

Pool = dict[str, FoundImages]
"""Images from elsewhere, by where they are from."""


@dataclass(frozen=True)
class _Asked:
    """What an evaluation is asked for, beside the settings of its context. ``statistics``: their digest."""

    shard: Shard | None
    alpha: float
    defence: Checkpoint | NamedDefence
    statistics: str
    images: Split
    pool: Pool


def evaluate(config: EvaluateConfig, sources: dict[str, str], *, fresh: bool = False) -> Path | None:
    """Base and sparsified model under the same attacks on the same images, test images by default, judged afresh."""
    context = RunContext("evaluate", config, sources, fresh=fresh)
    asked = _asked(context)
    if done := _done(context, asked.shard):
        return done
    work = _begin(context, asked)
    allowed = work.allowed(asked.pool)
    for name, found in asked.pool.items():
        of_these = f"{len(found):,} images of {name} are of these {len(work.examples):,} examples"
        note(f"pool: {of_these}, {allowed[name]:,} inside the budget")
    if context.config.plan:
        plan_evaluation(context, work.problem, work.examples, asked.alpha, work.state_folder)
        return None
    runs = work.attack()
    diagnostics = None
    if context.config.doubts:
        diagnostics, images = work.diagnose(runs[work.eps].evaluation())
        for run in runs.values():  # everything that is known to break an example counts
            run.try_pool(images)
        allowed |= work.allowed(images)
    outputs, distances = [context.place.paths.outcomes], dict[str, Any]()
    if context.config.find_eps:
        distances, files = find_eps(context, runs, work.eps, work.state_folder, work.fingerprint)
        outputs += files
    evaluations = {eps: run.evaluation() for eps, run in runs.items()}
    results = _shown(work, evaluations[work.eps], diagnostics, allowed) | distances
    if distances:
        console.print(distances_table(results).to_rich())
    if context.config.save_witnesses:
        outputs += keep_witnesses(context, runs, work.eps, work.operator)
    if len(work.grid) > 1:
        results["eps_curve"] = eps_rows(evaluations)
        console.print(eps_table(results, with_clean=True).to_rich())
        png, svg = (context.place.paths.folder / f"eps-curve.{ending}" for ending in ("png", "svg"))
        draw_eps_curve(results, norm=context.run.norm, title=f"{work.title()}, worst case", png=png, svg=svg)
        note(f"curve: {png}")
    if asked.shard is not None:
        results["n_state_files"] = asked.shard.count_in(work.state_folder)
    # late: until here the report before still has its own
    write_bytes(context.place.paths.outcomes, evaluations[work.eps].outcomes_npz())
    return context.write(outputs, results)


def _asked(context: RunContext[EvaluateConfig]) -> _Asked:
    """Fill in every default of the settings, and find what they name."""
    config = context.config
    shard = None if config.shard is None else read_shard(config.shard)
    if shard is not None:
        config = context.config = config.model_copy(update={"doubts": False, "save_witnesses": False, "find_eps": None})
    named = defence_of(context)
    alpha, upstream = (ALPHA, "fetch") if named else alpha_in_use(context, config.alpha)
    context.verified(upstream)
    eps, attacks = context.eps_of(config.eps), expand_attacks(config.attack)
    images = context.take(config.split, config.n_examples, shard=shard)
    indices = torch.tensor(list(images.indices))
    pool = read_pool(config.pool, context.split(config.split), indices) if config.pool else {}
    n_examples = len(images) if shard is None else config.n_examples
    defence = named or checkpoint_to_evaluate(context, config, upstream)
    statistics = "" if named else sha256_of(context.run.paths.statistics)
    context.settle(upstream, images, [attacks], eps=eps, alpha=alpha, n_examples=n_examples)
    context.inputs |= {f"pool {number}, {file.name}": sha256_of(file) for number, file in enumerate(config.pool, 1)}
    context.inputs |= named.inputs if named else {}
    return _Asked(shard, alpha, defence, statistics, images, pool)


def _done(context: RunContext[EvaluateConfig], shard: Shard | None) -> Path | None:
    """The report, if all of this was done already; that of a shard is of no use without the files it wrote."""
    if shard is not None and not context.fresh and (report := context.report_here()) is not None:
        folder = context.whole.paths.state / "evaluate"
        n_gone = report["results"].get("n_state_files", 0) - shard.count_in(folder)
        if n_gone > 0:
            name = context.config.shard
            note(f"evaluate: {n_gone} of the files that shard {name} wrote into {folder} are gone: done again")
            return None
    return context.done()


def _begin(context: RunContext[EvaluateConfig], asked: _Asked) -> "_Work":
    """The model on the device, and the examples; with ``--fresh``, what was done before is thrown away."""
    config, run = context.config, context.run
    if line := split_note(config.split):
        note(line)
    examples, grid = context.examples(asked.images), eps_grid(str(config.eps))
    eps = headline_eps(grid, run.source.dataset, run.norm)
    begins_anew = context.fresh and asked.shard is None
    begun = None if begins_anew else recorded(context.whole.paths.state / "evaluate", "precision")
    precision = config.precision or begun
    problem = problem_of(context, asked.defence, examples, eps, alpha=asked.alpha, precision=precision)
    if isinstance(problem.model, DefendedModel):
        torch.manual_seed(config.seed)  # of a defence that draws
        check_draws(problem.model, examples.x[: context.batch_size].to(context.device))
    is_faster = context.device == "cpu" or problem.precision != "fp32"
    channels_last = is_faster if config.channels_last is None else config.channels_last
    form = search_form(problem.model, compile=config.compile, channels_last=channels_last)
    work = _Work(context, asked, replace(problem, search_model=form), examples, grid, eps, channels_last)
    if begins_anew:
        discard(work.state_folder)
        discard(context.whole.paths.folder / "shards")  # reports about what is gone now
    if asked.shard is not None and not config.plan:
        begin_shard(context, work.state_folder)
    return work


@dataclass(frozen=True)
class _Work:
    """``eps`` of ``grid`` is what the report opens with, and that of ``problem``; ``examples`` are on the CPU."""

    context: RunContext[EvaluateConfig]
    asked: _Asked
    problem: Problem
    examples: Examples
    grid: tuple[str, ...]
    eps: str
    channels_last: bool

    @property
    def state_folder(self) -> Path:
        return self.context.whole.paths.state / "evaluate"

    @property
    def statistics_id(self) -> str:
        """What the operators depend on, alpha apart."""
        return self.asked.statistics + self.asked.defence.options_id()

    @property
    def fingerprint(self) -> dict[str, str]:
        """What outcomes depend on beside the attacks."""
        weights, split, dataset = str(self.context.weights_id), self.context.config.split, self.context.named_dataset
        return {"weights": weights, "statistics": self.statistics_id, "split": split, "dataset": dataset}

    @property
    def operator(self) -> str:
        return self.asked.defence.in_words(self.asked.alpha)

    def title(self, part: str = "") -> str:
        source, split = self.context.run.source.name, self.context.config.split
        return f"{source}, {self.operator}, {len(self.examples):,} {split} images{part}"

    def allowed(self, pool: Pool) -> dict[str, int]:
        """How many images of a pool an attacker may use, by where from."""
        cells = Cells(self.problem, self.examples)
        return {name: len(cells.admitted(found)) for name, found in pool.items()}

    def attack(self) -> dict[str, EvaluationRun]:
        """Every attack on every example at every eps, from the smallest: what breaks at it does at each larger one."""
        config, context, shard = self.context.config, self.context, self.asked.shard
        begun = shards_begun(context, self.state_folder)
        finish = shard is not None or config.finish or not begun
        plan = Plan(tuple(expand_attacks(config.attack)), self.asked.alpha, config.individual, finish)
        n_checked = min(config.n_doubt_examples, len(self.examples)) if config.doubts else 0
        afterwards = float(DIAGNOSTICS_COST * n_checked * (2 if plan.alpha else 1))
        runs, smaller = dict[str, EvaluationRun](), None
        with live("examples") as view:
            for i, eps in enumerate(self.grid, 1):
                problem = replace(self.problem, budget=Budget(self.problem.budget.norm, eps_value(eps)))
                folder = StateFolder(eps_state_folder(self.state_folder, eps, self.grid), self.fingerprint, shard)
                told = show_attacks(view, plan, place=(i, len(self.grid)), afterwards=afterwards)
                run = EvaluationRun(problem, self.examples, plan, folder, smaller=smaller, on_update=told)
                run.attack()
                run.try_pool(self.asked.pool)
                runs[eps] = smaller = run
        missing = torch.stack([run.missing for run in runs.values()]).any(dim=0)
        if missing.any():
            undone = missing.nonzero().flatten().tolist()
            raise missing_shards(context, begun, [1] * len(missing), undone, "examples")
        return runs

    def diagnose(self, evaluation: Evaluation) -> tuple[list[Diagnostic], Pool]:
        """The sanity checks on the first examples, and the images that break one on the way."""
        budget, n = self.problem.budget, min(self.context.config.n_doubt_examples, len(self.examples))
        outcomes = hashlib.sha256(evaluation.outcomes_npz())
        of_what = f"{outcomes.hexdigest()} {self.statistics_id} {self.context.weights_id}"
        key = f"{DOUBTS_VERSION} {of_what} {n} {budget.norm} {budget.eps} {self.problem.seed}"
        first = self.examples.at(torch.arange(n)).to(self.context.device)
        with live("kinds") as view:
            view.begin("doubts", None)
            diagnostics, found = diagnose(
                self.problem,
                first,
                evaluation,
                kept=KeptAnswers(self.state_folder / "doubts", key, note),
                on_kind=lambda what, done, total: view.begin(f"doubts: {what}", total, done),
            )
        if n_images := sum(map(len, found.values())):
            note(
                f"doubts: {n_images:,} images found on the way break an example that withstood the attacks: "
                "they count, as transfer"
            )
        return diagnostics, found


def _shown(
    work: _Work, evaluation: Evaluation, diagnostics: list[Diagnostic] | None, allowed: dict[str, int]
) -> dict[str, Any]:
    """The results for the report, once they are on the screen."""
    asked, config, run = work.asked, work.context.config, work.context.run
    results = evaluation.to_report()
    part = "" if asked.shard is None else f" (shard {config.shard})"
    console.print(show_evaluation(results, f"{work.title(part)}, {run.norm} {work.eps}", with_interval=is_wide()))
    published, is_named = published_results(run.source), isinstance(asked.defence, NamedDefence)
    notes = evaluation_notes(results, work.problem.n_classes, None if is_named else swept_alpha(work.context))
    notes += ["base: without the defence; sparsified: with it"] if is_named else []
    if asked.shard is not None:
        notes.append("a shard: the same command without --shard gathers them all, asks the doubts and saves witnesses")
    for line in filter(None, [*notes, published_note(published)]):
        note(line)
    if diagnostics is not None:
        results["doubts"] = [one.to_report() for one in diagnostics]
        console.print(show_diagnostics(results))
    search = {"precision": work.problem.precision, "compile": config.compile, "channels_last": work.channels_last}
    return {
        **results,
        **published,
        "eps": work.eps,
        "operator": work.operator,
        "pool": allowed,
        "site_alphas": asked.defence.site_alphas(asked.alpha),
        "search": search,
    }
