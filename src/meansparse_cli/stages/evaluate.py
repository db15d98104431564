"""``meansparse evaluate``, the fourth stage: base and sparsified model under the same attacks, judged afresh.

    evaluate   model, statistics, alpha, a split   -> outcomes.npz, evaluate.yaml

In order: what was asked for and what is there already; every attack on every example; the doubts, whose own breaks count as
well; the report. ``evaluate.py`` holds the attacks on the examples, ``evaluation.py`` the numbers made of them.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import discard, sha256_of, write_bytes
from ..operator.checkpoint import sparsify
from ..reporting.console import console, is_wide, live, note
from ..runs.folder import Run, located, weights_id
from ..runs.images import check_logits, count_classes, examples, images_id, load_images, split_note
from ..runs.model import alpha_in_use, checkpoint_to_evaluate, eps_of, load_base, pick_device
from ..runs.report import read_report
from ..runs.stage_report import finished, write_stage
from ..settings.shard import read_shard
from ..settings.stages import EvaluateConfig
from ..settings.values import eps_grid, eps_value

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.evaluate import EvaluateSettings
    from ..engine.evaluation import Evaluation
    from ..engine.state import Chunk
    from ..operator.sparsify import SparsifiedModel


def evaluate(config: EvaluateConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Base and sparsified model under the same attacks on the same images, test images by default, judged afresh."""
    from ..attacks import expand_attacks
    from ..attacks.precision import precision_on
    from ..attacks.result import Budget
    from ..engine.eps_sweep import eps_rows, eps_state_folder, evaluate_each_eps, headline_eps
    from ..engine.evaluate import EvaluateSettings, evaluate_robustness
    from ..engine.evaluation import attacks_id
    from ..engine.pool import admissible, read_pool
    from ..engine.state import recorded_setting
    from ..models.published import published_note, published_results
    from ..reporting.eps_curve import draw_eps_curve
    from ..reporting.evaluation_tables import eps_table, show_diagnostics, show_evaluation
    from ..reporting.progress import show_attacks

    run, started = located(config), time.monotonic()
    whole = run.place_of(config)
    place, shard = whole.shard_of(config), None if config.shard is None else read_shard(config.shard)
    if shard is not None:
        config = config.model_copy(update={"doubts": False, "save_witnesses": False, "pool": ()})
    alpha, upstream = alpha_in_use(run, config.alpha)
    eps = eps_of(run, config)
    attacks = tuple(expand_attacks(config.attack))
    indices, x, y = examples(run, config, config.split, config.n_examples, shard=shard)
    checkpoint = checkpoint_to_evaluate(run, config, upstream)
    statistics, weights = sha256_of(run.paths.statistics) + checkpoint.options_id(), weights_id(run)
    operator = checkpoint.in_words(alpha)
    pool = read_pool(config.pool, load_images(run, config, config.split), indices) if config.pool else {}
    inputs = {
        f"{upstream}.yaml": sha256_of(run.paths.report(upstream)),
        "images": images_id(run, config, config.split, config.n_examples, shard),
        "attacks": attacks_id(attacks),
    } | {f"pool {number}, {file.name}": sha256_of(file) for number, file in enumerate(config.pool, start=1)}
    resolved = config.model_copy(update={"eps": eps, "norm": run.norm, "alpha": alpha})
    if shard is None:
        resolved = resolved.model_copy(update={"n_examples": len(y)})
    state_folder = whole.paths.state / "evaluate"
    gone = 0 if shard is None else _n_gone(place, shard.files_in(state_folder))
    if gone and not fresh:
        note(f"evaluate: {gone} of the files that shard {config.shard} wrote into {state_folder} are gone: done again")
    elif done := finished("evaluate", place, resolved, inputs, fresh):
        return done

    if line := split_note(config.split):
        note(line)
    device = pick_device(config.device)
    base = load_base(run, config, device, checkpoint.rule)
    check_logits(base, run, config, x[:2].to(device))
    model = sparsify(base, checkpoint, alpha=alpha)
    grid = eps_grid(eps)
    eps = headline_eps(grid, run.source.dataset, run.norm)
    allowed = {name: admissible(chunk, x, Budget(run.norm, eps_value(eps))) for name, chunk in pool.items()}  # type: ignore[arg-type]
    for name, chunk in allowed.items():
        note(
            f"pool: {len(pool[name].positions):,} images of {name} are of these {len(y):,} examples, "
            f"{len(chunk.positions):,} inside the budget"
        )
    begun = None if fresh and shard is None else recorded_setting(state_folder, "precision")
    precision = precision_on(device, config.precision or begun)
    settings = EvaluateSettings(
        attacks=attacks, norm=run.norm, eps=eps_value(eps), n_examples=len(y), seed=config.seed,  # type: ignore[arg-type]
        batch_size=config.batch_size, device=device, individual=config.individual, precision=precision,
        compile=config.compile,
        channels_last=device == "cpu" or precision != "fp32" if config.channels_last is None else config.channels_last,
    )  # fmt: skip
    if fresh and shard is not None:
        for file in shard.files_in(state_folder):  # what the others wrote stays
            file.unlink()
    elif fresh:
        discard(state_folder)
        discard(whole.paths.folder / "shards")  # reports about what is gone now
    n_classes = count_classes(base, x[:2].to(device))
    fingerprint = {
        "weights": str(weights), "statistics": statistics, "split": config.split,
        "dataset": config.dataset or run.source.dataset,
    }  # fmt: skip

    def attack_all(pool: dict[str, Chunk]) -> dict[str, Evaluation]:
        with live("examples") as view:
            return evaluate_each_eps(
                lambda one, smaller: evaluate_robustness(
                    model, x.to(device), y.to(device), indices, alpha=alpha, settings=replace(settings, eps=eps_value(one)),
                    state_folder=eps_state_folder(state_folder, one, grid), fingerprint=fingerprint, n_classes=n_classes,
                    on_update=show_attacks(view), smaller=smaller, pool=pool, shard=shard,
                ),
                grid,
            )  # fmt: skip

    evaluations = attack_all(pool)
    doubts: list[dict[str, Any]] = []
    if config.doubts:
        doubts, found_by_doubts = _doubts(
            model, x, y, indices, evaluations[eps], settings, config.n_doubt_examples, state_folder / "doubts",
            key=f"{hashlib.sha256(evaluations[eps].outcomes_npz()).hexdigest()} {statistics} {weights}",
        )  # fmt: skip
        if found_by_doubts:  # everything that is known to break an example counts
            pool |= found_by_doubts
            allowed |= found_by_doubts
            evaluations = attack_all(pool)
    evaluation = evaluations[eps]
    found = evaluation.to_report()
    part = "" if shard is None else f" (shard {config.shard})"
    title = f"{run.source.name}, {operator}, {len(y):,} {config.split} images{part}, {run.norm} {eps}"
    console.print(show_evaluation(found, title, with_interval=is_wide()))
    if shard is not None:
        note("a shard: the same command without --shard gathers them all, asks the doubts and saves witnesses")
    published = published_results(run.source)
    if line := published_note(published):
        note(line)
    outcomes = evaluation.outcomes_npz()
    if config.doubts:
        found["doubts"] = doubts
        console.print(show_diagnostics(found))
    outputs = [place.paths.outcomes]
    if config.save_witnesses:
        folders = [eps_state_folder(state_folder, one, grid) for one in grid if eps_value(one) <= eps_value(eps)]
        outputs += _save_witnesses(
            run, place.paths.folder, config, model, operator, evaluation, folders, pool, settings, (x, y, indices)
        )
    results = (
        found
        | published
        | {
            "eps": eps,
            "operator": operator,
            "pool": {name: len(chunk.positions) for name, chunk in allowed.items()},
            "site_alphas": checkpoint.site_alphas(alpha),
            "search": {
                "precision": settings.precision,
                "compile": settings.compile,
                "channels_last": settings.channels_last,
            },
        }
    )
    if len(grid) > 1:
        results["eps_curve"] = eps_rows(evaluations)
        console.print(eps_table(results, with_clean=True).to_rich())
        draw_eps_curve(
            results, norm=run.norm, title=f"{run.source.name}, {operator}, {len(y):,} {config.split} images, worst case",
            png=place.paths.folder / "eps-curve.png", svg=place.paths.folder / "eps-curve.svg",
        )  # fmt: skip
        note(f"curve: {place.paths.folder / 'eps-curve.png'}")
    if shard is not None:
        results["n_state_files"] = len(shard.files_in(state_folder))
    write_bytes(place.paths.outcomes, outcomes)  # late: until here the report before still has its own
    return write_stage(place, "evaluate", resolved, sources, inputs, outputs, device, started, results)


def _n_gone(place: Run, files: list[Path]) -> int:
    """How many fewer files of its state a shard has than when its report was written: the report alone is of no use."""
    path = place.paths.report("evaluate")
    if not path.exists():
        return 0
    before = read_report(path, "evaluate", mend=place.command("evaluate"))["results"]
    return max(before.get("n_state_files", 0) - len(files), 0)


def _doubts(
    model: SparsifiedModel, x: Tensor, y: Tensor, indices: Tensor, evaluation: Evaluation, settings: EvaluateSettings,
    n_examples: int, state_folder: Path, *, key: str,
) -> tuple[list[dict[str, Any]], dict[str, Chunk]]:  # fmt: skip
    """What ``evaluate.yaml`` holds under ``doubts``, from the first ``n_examples``, and the images that break on the way."""
    from ..attacks.result import Budget
    from ..data.examples import Examples
    from ..diagnostics import DOUBTS_VERSION, Conditions, KeptAnswers, diagnose

    n, device = min(n_examples, len(y)), settings.device
    with live("kinds") as view:
        view.begin("doubts", None)

        def on_kind(what: str, done: int, total: int) -> None:
            view.begin(f"doubts: {what}", total, done)

        n_classes = count_classes(model, x[:2].to(device))
        budget = Budget(settings.norm, settings.eps)
        kept = KeptAnswers(
            state_folder, f"{DOUBTS_VERSION} {key} {n} {settings.norm} {settings.eps} {settings.seed}", note
        )
        found = diagnose(
            model,
            Examples(x[:n], y[:n].long(), indices[:n].cpu()).to(device),
            evaluation,
            Conditions(budget, settings.seed, settings.batch_size, n_classes),
            kept=kept,
            on_kind=on_kind,
        )
    n_images = sum(len(chunk.positions) for chunk in found.images.values())
    if n_images:
        note(
            f"doubts: {n_images:,} images found on the way break an example that withstood the attacks: they count, as transfer"
        )
    return [one.to_report() for one in found.diagnostics], found.images


def _save_witnesses(
    run: Run, folder: Path, config: EvaluateConfig, model: SparsifiedModel, operator: str, evaluation: Evaluation,
    folders: list[Path], pool: dict[str, Chunk], settings: EvaluateSettings, examples: tuple[Tensor, Tensor, Tensor],
) -> list[Path]:  # fmt: skip
    """``witnesses.safetensors``, and a ``.pt`` for each model the size of the test set; returns the files."""
    from ..engine.witnesses import collect_witnesses, save_external, save_witnesses

    x, y, indices = examples
    witnesses = collect_witnesses(model, x, y, evaluation, folders, settings, pool)
    files = [folder / "witnesses.safetensors"]
    save_witnesses(
        files[0], witnesses, indices, norm=settings.norm, eps=settings.eps, alpha=evaluation.alpha, operator=operator
    )
    test = load_images(run, config, config.split)
    for name, found in witnesses.items():
        file = folder / f"witnesses-{name}.pt"
        if save_external(file, test, found, len(y)):
            files.append(file)
    note(
        f"witnesses: {', '.join(f'{len(found.images):,} on {name}' for name, found in witnesses.items())} ({files[0]})"
    )
    return files
