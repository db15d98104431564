"""``meansparse verify``: adversarial images from whoever it is, judged afresh."""

from pathlib import Path

from torch import nn
from torch.utils.data import Subset

from ..attacks.problem import Budget, Problem
from ..data.identity import content_id
from ..engine.image_files import match_examples, read_images, said_by
from ..engine.verify import Judgement, judge_images
from ..errors import ConfigError, DataError
from ..files import sha256_of
from ..operator.checkpoint import sparsify
from ..reporting.console import console, note, phase
from ..reporting.evaluation_tables import judgements_table
from ..runs.context import RunContext
from ..runs.defence import DEFENCE_WORDS
from ..runs.folder import file_name
from ..runs.operators import alpha_in_use, check_model, checkpoint_to_evaluate, has_alpha
from ..settings.stages import VerifyConfig
from ..settings.values import eps_text, eps_value
from .fetch import ensure_fetched


def verify(config: VerifyConfig, sources: dict[str, str], file: Path) -> tuple[Path, bool]:
    """Judge the images of a file afresh, whoever made them; the report, and whether all of them are admissible."""
    ensure_fetched(config, sources)
    context = RunContext("verify", config, sources)
    run, about = context.run, said_by(file)
    context.config = config = _as_found(context, config, file, about)
    eps = context.eps_of(config.eps)
    image_sets = read_images(file)
    test = context.split(config.split)
    model, alpha, operator = _model(context, config, file, about)
    context.inputs = {file.name: sha256_of(file), "images": content_id(test)}
    context.config = config.model_copy(update={"eps": eps, "norm": run.norm, "alpha": alpha})
    budget = Budget(run.norm, eps_value(eps))  # type: ignore[arg-type]
    judgements: list[Judgement] = []
    n_classes = 0
    for images in image_sets:
        matched = match_examples(images, test, str(file))
        examples = context.examples(Subset(test, matched.evaluated.tolist()))
        n_classes = n_classes or check_model(context, model, test, examples.x[:2].to(context.device))
        problem = Problem(model, budget, n_classes, seed=0, batch_size=context.batch_size)
        with phase(f"judging {len(matched.images):,} images"):
            judged = judge_images(matched, examples, problem, alpha)
        judgements.append(judged)
        if images.indices is None and judged.n_unchanged:
            note(
                f"verify: {judged.n_unchanged:,} of the {judged.n_images:,} images are the clean ones, and nothing in "
                "the file says whether their examples were attacked: they count as withstood, so that each robust "
                "accuracy is an upper bound"
            )
    title = f"{file}: {run.source.name}, {run.norm} {eps}" + (f", {operator}" if alpha else "")
    sets = [judged.to_report() for judged in judgements]
    console.print(judgements_table(sets, run.norm, title).to_rich(strong="bold red"))
    is_admissible = all(judged.is_admissible for judged in judgements)
    path = run.paths.folder / f"verify-{file_name(file.name)}.yaml"
    return context.write([], {"admissible": is_admissible, "sets": sets}, path=path), is_admissible


def _model(
    context: RunContext, config: VerifyConfig, file: Path, about: dict[str, str]
) -> tuple[nn.Module, float, str]:
    """The model that judges, its alpha and its operator in words; without an alpha the base model alone."""
    if about.get("operator", "").startswith(DEFENCE_WORDS):
        raise ConfigError(
            f"{file.name} was found with {about['operator']}, and verify knows MeanSparse alone",
            hint="evaluate --pool FILE, with the same --defence, --base and --draws, judges its images on both models",
        )
    if not context.has("calibrate") or (config.alpha is None and not has_alpha(context)):
        note(f"verify: {context.run.paths.folder} has no alpha yet, so the base model alone is judged")
        return context.base(), 0.0, ""
    alpha, upstream = alpha_in_use(context, config.alpha)
    checkpoint = checkpoint_to_evaluate(context, config, upstream)
    operator = checkpoint.in_words(alpha)
    if about.get("operator", operator) != operator:
        note(f"verify: {file.name} was found with {about['operator']}, it is judged with {operator}")
    return sparsify(context.base(checkpoint.rule), checkpoint, alpha=alpha), alpha, operator


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
