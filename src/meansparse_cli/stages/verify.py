"""``meansparse verify``: adversarial images from whoever it is, judged afresh."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from ..files import sha256_of
from ..operator.checkpoint import sparsify
from ..reporting.console import console, note
from ..reporting.evaluation_tables import judgements_table
from ..runs.folder import Run, file_name
from ..runs.images import check_data, load_images
from ..runs.model import alpha_in_use, checkpoint_to_evaluate, eps_of, has_alpha, load_base, pick_device
from ..runs.report import write_report
from ..runs.stage_report import config_block, plain
from ..settings.stages import VerifyConfig
from ..settings.values import eps_text, eps_value
from .pipeline import ensure_fetched

if TYPE_CHECKING:
    from torch import nn


def verify(config: VerifyConfig, sources: dict[str, str], file: Path) -> tuple[Path, bool]:
    """Judge the images of a file afresh, whoever made them; returns the report, and whether all of them are admissible."""
    from ..attacks.result import Budget
    from ..data.datasets import content_id
    from ..engine.verify import Judgement, judge_images, match_examples, read_images, said_by
    from ..engine.witnesses import examples_at

    run, started = ensure_fetched(config, sources), time.monotonic()
    about = said_by(file)
    config = _as_found(run, config, file, about)
    eps = eps_of(run, config)
    budget = Budget(run.norm, eps_value(eps))  # type: ignore[arg-type]
    image_sets = read_images(file)
    test = load_images(run, config, config.split)
    device = pick_device(config.device)
    model: nn.Module
    if run.paths.report("calibrate").exists() and (config.alpha is not None or has_alpha(run)):
        alpha, upstream = alpha_in_use(run, config.alpha)
        checkpoint = checkpoint_to_evaluate(run, config, upstream)
        model = sparsify(load_base(run, config, device, checkpoint.rule), checkpoint, alpha=alpha)
        operator = checkpoint.in_words(alpha)
        if about.get("operator", operator) != operator:
            note(f"verify: {file.name} was found with {about['operator']}, it is judged with {operator}")
    else:
        operator = ""
        alpha, model = 0.0, load_base(run, config, device)
        note(f"verify: {run.paths.folder} has no alpha yet, so the base model alone is judged")
    judgements: list[Judgement] = []
    for images in image_sets:
        matched = match_examples(images, test, str(file))
        x, y = examples_at(test, matched.evaluated)
        if not judgements:
            check_data(model, run, config, test, x[:2].to(device))
        judged = judge_images(matched, x, y, model, alpha, budget, batch_size=config.batch_size, device=device)
        judgements.append(judged)
        if images.indices is None and judged.n_unchanged:
            note(
                f"verify: {judged.n_unchanged:,} of the {judged.n_images:,} images are the clean ones, and nothing in the file says "
                "whether their examples were attacked: they count as withstood, so that each robust accuracy is an upper bound"
            )
    title = f"{file}: {run.source.name}, {run.norm} {eps}" + (f", {operator}" if alpha else "")
    sets = [judged.to_report() for judged in judgements]
    console.print(judgements_table(sets, run.norm, title).to_rich(strong="bold red"))
    path = run.paths.folder / f"verify-{file_name(file.name)}.yaml"
    inputs = {file.name: sha256_of(file), "images": content_id(test)}
    resolved = config.model_copy(update={"eps": eps, "norm": run.norm, "alpha": alpha})
    report = write_report(
        path, stage="verify", config=config_block(resolved, sources), inputs=inputs, outputs={},
        results=plain({"admissible": all(j.is_admissible for j in judgements), "sets": sets}),
        device=device, seconds=time.monotonic() - started,
    )  # fmt: skip
    return path, bool(report["results"]["admissible"])


def _as_found(run: Run, config: VerifyConfig, file: Path, about: dict[str, str]) -> VerifyConfig:
    """The settings, with the eps and alpha that the file was found under where they were not given.

    Raises ``DataError`` for a file of another norm: no eps of one says anything about the other.
    """
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
    if alpha and run.paths.report("calibrate").exists():
        judged = alpha_in_use(run, config.alpha)[0] if config.alpha is not None or has_alpha(run) else None
        if config.alpha is None and judged != alpha:
            config = config.model_copy(update={"alpha": alpha})
            note(f"verify: {file.name} was found at alpha {alpha:g}, at which it is judged")
    return config
