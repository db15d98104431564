"""``meansparse verify``: adversarial images from whoever it is, judged afresh."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ..attacks.problem import Budget, Problem
from ..data.examples import Examples, stack_examples
from ..data.identity import content_id
from ..data.splits import Split, take_examples
from ..engine.image_files import MatchedImages, match_examples, read_images, said_by
from ..engine.verify import KIND, JudgedSets, judge_images
from ..errors import ConfigError, DataError
from ..files import discard, load_torch, sha256_of
from ..ledger import Ledger
from ..operator.checkpoint import Checkpoint, sparsify
from ..reporting.console import console, live, note
from ..reporting.evaluation_tables import judgements_table
from ..runs.context import RunContext
from ..runs.defence import DEFENCE_WORDS
from ..runs.folder import file_name
from ..runs.operators import alpha_in_use, check_model, checkpoint_to_evaluate, has_alpha
from ..settings.shard import read_shard
from ..settings.stages import VerifyConfig
from ..settings.values import eps_text, eps_value
from .fetch import ensure_fetched
from .gather import begin_shard, mend, missing_shards, shard_done, shards_begun
from .plan import FEWEST, plan_judging

log = logging.getLogger(__name__)


def verify(config: VerifyConfig, sources: dict[str, str], *, fresh: bool = False) -> Path | None:
    """Judge the images of a file afresh, whoever made them; the report, which says whether all are admissible."""
    ensure_fetched(config, sources)
    context = RunContext("verify", config, sources, fresh=fresh)
    work = _begin(context)
    if config.plan:
        n = sum(len(given.evaluated) for given in work.sets)
        few = work.examples(0, torch.arange(min(4 * FEWEST, len(work.sets[0].evaluated))))
        n_done = sum(len(load_torch(file)["rows"]) for file in work.folder.glob(f"{KIND}/*.pt"))
        plan_judging(context, work.problem, few, n=n, n_done=n_done)
        return None
    if config.shard is not None:
        begin_shard(context, work.folder)
        own = read_shard(config.shard).positions(len(work.judged))
        work.judge(work.judged.missing(own))
        return shard_done(context, len(own), len(work.judged), "examples")
    return work.whole()


@dataclass(frozen=True)
class _Work:
    """``test``: the split that the ``sets`` are of; ``checkpoint``: that of the model that judges, at ``alpha``."""

    context: RunContext[VerifyConfig]
    problem: Problem
    alpha: float
    checkpoint: Checkpoint | None
    test: Split
    sets: list[MatchedImages]

    @property
    def folder(self) -> Path:
        """What was judged before a kill, or by shards."""
        return self.context.whole.paths.state / "verify"

    @cached_property
    def judged(self) -> JudgedSets:
        context, shard = self.context, self.context.config.shard
        key = context.inputs | {name: getattr(context.config, name) for name in ("eps", "norm", "alpha")}
        key |= {"weights": context.weights_id, "preprocessing": repr(context.preprocessing)}
        if self.checkpoint is not None:
            key["statistics"] = sha256_of(context.run.paths.statistics) + self.checkpoint.options_id()
        if context.fresh and shard is None:
            discard(self.folder)
        writer = None if shard is None else read_shard(shard).name
        return JudgedSets(Ledger(self.folder, key, writer=writer, mend=mend, note=log.warning), self.sets)

    def examples(self, k: int, rows: Tensor) -> Examples:
        """Some of those that set ``k`` is of."""
        positions = self.sets[k].evaluated[rows]
        x, y = stack_examples(Subset(self.test, positions.tolist()), self.context.config.workers)
        return Examples(x, y, positions)

    def judge(self, numbers: Sequence[int]) -> None:
        """Those of the examples at these ``numbers``, a batch at a time."""
        with live("images") as view:
            view.begin("judging", len(numbers), work=(len(numbers), 0))
            for k, given in enumerate(self.sets):
                for rows in self.judged.in_set(k, numbers, self.problem.batch_size):
                    found = judge_images(given, rows, self.examples(k, rows), self.problem, self.alpha)
                    self.judged.add(k, rows, found)
                    view.advance(len(rows))

    def whole(self) -> Path:
        """The report of all that was judged; what shards have left undone is done here where that was asked for."""
        context, undone = self.context, self.judged.missing()
        if undone and (begun := shards_begun(context, self.folder)) and not context.config.finish:
            raise missing_shards(context, begun, [1] * len(self.judged), set(undone), "examples")
        self.judge(undone)
        judgements, run = self.judged.judgements(), context.run
        file, eps = context.config.file, context.config.eps
        for given, found in zip(self.sets, judgements, strict=True):
            if given.is_whole and found.n_unchanged:
                note(
                    f"verify: {found.n_unchanged:,} of the {found.n_images:,} images are the clean ones, and nothing "
                    "in the file says whether their examples were attacked: they count as withstood, so that each "
                    "robust accuracy is an upper bound"
                )
        operator = "" if self.checkpoint is None else f", {self.checkpoint.in_words(self.alpha)}"
        title = f"{file}: {run.source.name}, {run.norm} {eps}{operator}"
        sets = [found.to_report() for found in judgements]
        console.print(judgements_table(sets, run.norm, title).to_rich(strong="bold red"))
        is_admissible = all(found.is_admissible for found in judgements)
        path = run.paths.folder / f"verify-{file_name(file.name)}.yaml"
        report = context.write([], {"admissible": is_admissible, "sets": sets}, path=path)
        discard(context.whole.paths.folder)
        with suppress(OSError):  # another file's is there
            context.whole.paths.folder.parent.rmdir()
        return report


def _begin(context: RunContext[VerifyConfig]) -> _Work:
    run, file = context.run, context.config.file
    about = said_by(file)
    context.config = config = _as_found(context, context.config, file, about)
    eps = context.eps_of(config.eps)
    image_sets = read_images(file)
    test = context.split(config.split)
    model, alpha, checkpoint = _model(context, config, file, about)
    context.inputs = {file.name: sha256_of(file), "images": content_id(test)}
    context.config = config.model_copy(update={"eps": eps, "norm": run.norm, "alpha": alpha})
    matched = [match_examples(images, test, str(file)) for images in image_sets]
    first = stack_examples(take_examples(test, min(len(test), 2)))[0].to(context.device)
    problem = Problem(
        model,
        Budget(run.norm, eps_value(eps)),  # type: ignore[arg-type]
        check_model(context, model, test, first),
        seed=0,
        batch_size=context.batch_size,
    )
    return _Work(context, problem, alpha, checkpoint, test, matched)


def _model(
    context: RunContext, config: VerifyConfig, file: Path, about: dict[str, str]
) -> tuple[nn.Module, float, Checkpoint | None]:
    """The model that judges, its alpha and its checkpoint; without an alpha the base model alone."""
    if about.get("operator", "").startswith(DEFENCE_WORDS):
        raise ConfigError(
            f"{file.name} was found with {about['operator']}, and verify knows MeanSparse alone",
            hint="evaluate --pool FILE, with the same --defence, --base and --draws, judges its images on both models",
        )
    if not context.has("calibrate") or (config.alpha is None and not has_alpha(context)):
        note(f"verify: {context.run.paths.folder} has no alpha yet, so the base model alone is judged")
        return context.base(), 0.0, None
    alpha, upstream = alpha_in_use(context, config.alpha)
    checkpoint = checkpoint_to_evaluate(context, config, upstream)
    operator = checkpoint.in_words(alpha)
    if about.get("operator", operator) != operator:
        note(f"verify: {file.name} was found with {about['operator']}, it is judged with {operator}")
    return sparsify(context.base(checkpoint.rule), checkpoint, alpha=alpha), alpha, checkpoint


def _as_found(context: RunContext, config: VerifyConfig, file: Path, about: dict[str, str]) -> VerifyConfig:
    """The settings, with the eps and alpha that the file was found under where they were not given.

    Raises ``DataError`` for a file of another norm: no eps of one says anything about the other.
    """
    run = context.run
    if about.get("norm", run.norm) != run.norm:
        raise DataError(
            f"{file} was found under {about['norm']}, {run.paths.folder} is of {run.norm}",
            hint=f"judge it in that norm: --norm {about['norm']}",
        )
    if "eps" in about:
        theirs = eps_text(float(about["eps"]))
        if config.eps is None:
            config = config.model_copy(update={"eps": theirs})
        elif eps_value(config.eps) != float(about["eps"]):
            note(f"verify: {file.name} was found at eps {theirs}, it is judged at {config.eps}")
    alpha = float(about.get("alpha", 0))
    if alpha and config.alpha is None and context.has("calibrate"):
        judged = alpha_in_use(context, None)[0] if has_alpha(context) else None
        if judged != alpha:
            config = config.model_copy(update={"alpha": alpha})
            note(f"verify: {file.name} was found at alpha {alpha:g}, at which it is judged")
    return config
