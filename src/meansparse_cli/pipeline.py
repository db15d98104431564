"""The four stages in order: what each reads, does and writes. Read this file first.

    fetch        a model name                 -> weights in the cache, fetch.yaml
    calibrate    model, calibration split     -> statistics.safetensors, calibrate.yaml
    sweep-alpha  + held-out split             -> meansparse.safetensors, curve, sweep-alpha.yaml
    evaluate     + test split                 -> outcomes.npz, evaluate.yaml

Every stage verifies the reports before it (each names its inputs by sha256), checks everything it can before it computes,
writes its report last and atomically, and returns it at once if the same was already done.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import sha256_of
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint, sparsify
from .config import (
    AttackConfig,
    CalibrateConfig,
    EvaluateConfig,
    FetchConfig,
    ModelConfig,
    PlotConfig,
    StageConfig,
    SweepAlphaConfig,
    VerifyConfig,
    check_eps,
    eps_grid,
    eps_value,
)
from .console import bar, console, live, note, sites_table
from .errors import ArtifactError, ConfigError, DataError
from .report import RunPaths, read_report, verify_outputs, write_report

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Subset

    from .data import SplitName
    from .evaluate import EvaluateSettings
    from .evaluation import Evaluation
    from .models import ModelSource
    from .published_checkpoint import PublishedCheckpoint
    from .sites import Site
    from .sparsify import SparsifiedModel

_NOT_IN_REPORT = {"run", "allow_pickle"}
# Settings that change how fast or where a result is computed, not which result it is.
_NOT_IN_RESULT = {
    "run", "allow_pickle", "device", "workers", "data_dir", "model", "from_file", "compile", "channels_last",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run folder and the model it is about."""

    source: ModelSource
    paths: RunPaths
    norm: str

    def command(self, stage: str) -> str:
        """The command a user types for another stage of this run."""
        model = f" --model {self.source.name}" if stage in ("fetch", "calibrate") else ""
        return f"meansparse {stage}{model} --run {self.paths.folder}"


def locate_run(config: ModelConfig) -> Run:
    """The run folder that these settings mean: ``--run``, or one named after data set, norm and model."""
    from .models import ModelSource, resolve_model

    is_new = config.run is None or not RunPaths(config.run).report("fetch").exists()
    if config.model is None and is_new and isinstance(config, FetchConfig) and config.from_file is not None:
        config = _with_model_of_file(config, config.from_file)
    if config.model is None:
        if config.run is None:
            raise ConfigError("no model and no run folder", hint="name one: --model digits, or --run runs/NAME")
        report = read_report(
            RunPaths(config.run).report("fetch"), "fetch", mend=f"meansparse fetch --model NAME --run {config.run}"
        )
        source = ModelSource(**report["results"]["model"])
        return Run(source, RunPaths(config.run), config.norm or _norm_of(source.threat))
    source = resolve_model(config.model, config.dataset, config.threat)
    norm = config.norm or _norm_of(source.threat)
    dataset = config.dataset or source.dataset
    folder = config.run or Path("runs") / _file_name(f"{Path(dataset).stem}-{norm}-{source.name}")
    return Run(source, RunPaths(folder), norm)


def fetch(config: FetchConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Weights of the model into the cache; ``fetch.yaml`` into the run folder."""
    from .fetch import cache_folder, fetch_weights
    from .models import load_model

    run, started = locate_run(config), time.monotonic()
    report_file = run.paths.report("fetch")
    with live("bytes") as view:
        begun = False

        def on_progress(done: int, total: int | None) -> None:
            nonlocal begun
            if not begun:
                view.begin(f"fetching {run.source.name}", total)
                begun = True
            view.advance(done - view.done)

        fetched = fetch_weights(
            run.source,
            cache=cache_folder(),
            from_file=config.from_file,
            weights=config.weights,
            allow_pickle=config.allow_pickle,
            on_progress=on_progress,
        )
    if run.source.kind == "factory" or config.weights is not None:
        # what nobody has checked yet: that the factory is there, and that the weights are this network's
        load_model(run.source, fetched.paths or None, allow_pickle=config.allow_pickle)
    results = {
        "model": asdict(run.source),
        "sha256": fetched.sha256 if fetched.files else None,
        "size": fetched.size,
        "files": [_plain(asdict(file)) for file in fetched.files],
    }
    if report_file.exists() and not fresh:
        before = read_report(report_file, "fetch", mend=run.command("fetch"))["results"]
        if before == results:
            note(f"fetch: {run.source.name} is already there")
            return report_file
        if before["model"] != results["model"]:
            raise ArtifactError(
                f"{run.paths.folder} is a run of {before['model']['name']}, not of {run.source.name}",
                hint="choose another folder: --run DIR",
            )
    write_report(
        report_file, stage="fetch", config=_config_block(config, sources), inputs={}, outputs={}, results=results,
        device="cpu", seconds=time.monotonic() - started,
    )  # fmt: skip
    origin = ", ".join(file.origin for file in fetched.files) or "no weights of its own"
    note(f"fetch: {run.source.name}, {fetched.size:,} bytes from {origin}")
    return report_file


def list_sites(config: CalibrateConfig, sources: dict[str, str]) -> tuple[list[Site], dict[int, str]]:
    """Every site, gates included and marked; and by index, for those that calibrate would use, what chose them."""
    import torch

    from .data import KNOWN_DATASETS
    from .site_rules import chosen_by

    run = _ensure_fetched(config, sources)
    config = _with_site_rule(run, config, sources)
    model = _load_base(run, config, "cpu", config.sites)
    facts = KNOWN_DATASETS.get(config.dataset or run.source.dataset)
    if facts is not None:
        images = torch.rand((2, *facts.image_shape), generator=torch.Generator().manual_seed(0))
    else:
        _, images, _ = _examples(run, config, "calibration", 2)
    found = _find_sites(model, run, config, images)
    return found, chosen_by(found, config.sites, include_gates=config.include_gates)


def calibrate(config: CalibrateConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """One pass over the calibration split: mean and standard deviation of each channel at each site."""
    from .calibrate import calibrate_channels
    from .data import content_id, stack_examples, take_examples
    from .site_rules import chosen_by, select_sites

    run, started = _ensure_fetched(config, sources), time.monotonic()
    config = _with_site_rule(run, config, sources)
    if config.statistics == "stored":
        return _take_stored(run, config, sources, fresh)
    if config.fraction is not None and config.n_examples is not None:
        raise ConfigError("both --fraction and --n-examples were given", hint="give one of them")
    images = _load_split(run, config, "calibration")
    n = config.n_examples if config.fraction is None else max(1, round(config.fraction * len(images)))
    images = take_examples(images, n, seed=config.seed)
    inputs = {"fetch.yaml": sha256_of(run.paths.report("fetch")), "images": content_id(images)}
    if done := _finished("calibrate", run, config, inputs, fresh):
        return done

    if fresh:
        (run.paths.state / "calibrate.pt").unlink(missing_ok=True)
    device = pick_device(config.device)
    model = _load_base(run, config, device, config.sites)
    first, _ = stack_examples(take_examples(images, min(len(images), 4)))
    _check_data(model, run, config, images, first.to(device))
    found = _find_sites(model, run, config, first.to(device))
    sites = select_sites(found, config.sites, include_gates=config.include_gates)
    console.print(sites_table(found, chosen_by(found, config.sites, include_gates=config.include_gates)))
    with bar("calibrating", len(images)) as advance:
        statistics = calibrate_channels(
            model, sites, images, batch_size=config.batch_size, estimator=config.estimator, device=device,
            n_workers=config.workers, state_file=run.paths.state / "calibrate.pt",
            fingerprint=inputs | {"batch_size": config.batch_size, "estimator": config.estimator, "sites": [s.name for s in sites]},
            on_batch=advance,
        )  # fmt: skip
    save_checkpoint(
        run.paths.statistics, Checkpoint(tuple(sites), tuple(statistics), config.estimator, rule=config.sites)
    )
    report = _write(
        run, "calibrate", config, sources, inputs, [run.paths.statistics], device, started,
        {
            "n_images": len(images),
            "estimator": config.estimator,
            "rule": config.sites,
            "n_sites_found": len(found),
            "n_gates_left_out": 0 if config.include_gates else sum(site.gate for site in found),
            "sites": [_site_row(site, s.count) for site, s in zip(sites, statistics, strict=True)],
        },
    )  # fmt: skip
    (run.paths.state / "calibrate.pt").unlink(missing_ok=True)
    note(f"calibrate: {len(sites)} sites, {len(images):,} images, {time.monotonic() - started:.1f} s")
    return report


def _take_stored(run: Run, config: CalibrateConfig, sources: dict[str, str], fresh: bool) -> Path:
    """Calibrate without images: the operators that a published checkpoint holds are taken as they are, alpha included."""
    import torch

    from .data import KNOWN_DATASETS
    from .site_rules import chosen_by, select_sites

    started, inputs = time.monotonic(), {"fetch.yaml": sha256_of(run.paths.report("fetch"))}
    if done := _finished("calibrate", run, config, inputs, fresh):
        return done
    held = _held_by_weights(run, config)
    if held is None:
        raise ConfigError(
            f"the weights of {run.source.name} hold no MeanSparse operators, so no statistics are stored in them",
            hint="measure them: leave --statistics out",
        )
    if not any(bool(s.std.any()) for s in held.statistics.values()):
        raise ConfigError(
            "the statistics that the weights hold are all zero", hint="measure them: leave --statistics out"
        )
    model = _load_base(run, config, "cpu", config.sites)
    found = _find_sites(model, run, config, torch.rand((2, *KNOWN_DATASETS[run.source.dataset].image_shape)))
    sites = select_sites(found, config.sites)
    console.print(sites_table(found, chosen_by(found, config.sites)))
    paths = [str(held.path_of(site.path)) for site in sites]
    statistics = tuple(held.statistics[path] for path in paths)
    checkpoint = Checkpoint(tuple(sites), statistics, "published", held.alpha, rule=config.sites)
    save_checkpoint(run.paths.statistics, checkpoint)
    known = held.file
    report = _write(
        run, "calibrate", config, sources, inputs, [run.paths.statistics], "cpu", started,
        {
            "n_images": 0,
            "estimator": "published",
            "statistics": "stored",
            "alpha": held.alpha,
            "published_model": None if known is None else {"name": known.name, "file": known.file_name, "alpha": known.alpha},
            "rule": config.sites,
            "n_sites_found": len(found),
            "n_gates_left_out": 0,
            "sites": [_site_row(site, s.count) for site, s in zip(sites, statistics, strict=True)],
        },
    )  # fmt: skip
    alpha = "no alpha that all of them share" if held.alpha is None else f"alpha {held.alpha:g}"
    note(
        f"calibrate: {len(sites)} sites with the statistics of {held.file.file_name if held.file else 'the weights'}, {alpha}"
    )
    if held.alpha is None:
        theirs = f"the authors evaluate at {held.file.alpha:g}: " if held.file else ""
        note(f"{theirs}choose one with sweep-alpha, or give it: meansparse evaluate --alpha A --run {run.paths.folder}")
    return report


def sweep_alpha(config: SweepAlphaConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Clean and robust accuracy of each alpha on the held-out split, plain and BPDA; the chosen alpha's checkpoint."""
    from .alpha_rules import alphas_by_rule
    from .attacks.result import Budget
    from .choice import ChoiceRule
    from .curve import draw_alpha_curve
    from .pair_attack import PairSettings
    from .pairs import PairStore
    from .sweep_alpha import SweepSettings, families_of, grid_of, sweep_alphas
    from .sweep_view import say_sweep, show_sweep

    run, started = _located(config), time.monotonic()
    calibrated = _verified(run, "calibrate")
    eps = _eps(run, config)
    plain, bpda = families_of(
        config.attack, config.objective if sources.get("objective", "default") != "default" else ""
    )
    alphas, changes = grid_of(config.alphas)
    if changes and sources.get("alphas") != "default":
        note(f"alphas: {changes}: {', '.join(f'{alpha:g}' for alpha in alphas)}")
    _check_disjoint(run, config)
    indices, x, y = _examples(run, config, "held-out", config.n_examples, clamp=sources.get("n_examples") == "default")
    inputs = {
        "calibrate.yaml": sha256_of(run.paths.report("calibrate")),
        "images": _images_id(run, config, "held-out", len(y)),
    }
    resolved = config.model_copy(update={"eps": eps, "norm": run.norm, "alphas": alphas, "n_examples": len(y)})
    if done := _finished("sweep-alpha", run, resolved, inputs, fresh):
        return done

    device = pick_device(config.device)
    checkpoint = _with_options(load_checkpoint(run.paths.statistics), config)
    base = _load_base(run, config, device, checkpoint.rule)
    _check_logits(base, run, config, x[:2].to(device))
    model = sparsify(base, checkpoint, alpha=0.0)
    if fresh:
        shutil.rmtree(run.paths.state / "sweep-alpha", ignore_errors=True)
    n_classes, budget = _n_classes(base, x[:2].to(device)), Budget(run.norm, eps_value(eps))  # type: ignore[arg-type]
    store = PairStore(
        model, x.to(device), y.to(device), indices, PairSettings(budget, config.seed, config.batch_size, n_classes),
        plain=plain, bpda=bpda, folder=run.paths.state / "sweep-alpha", block_size=config.block_size,
        key={
            "statistics": sha256_of(run.paths.statistics), "weights": _weights_id(run), "options": checkpoint.options_id(),
        },
    )  # fmt: skip
    settings = SweepSettings(
        alphas=alphas, site_weights=(1.0,) * len(model.sites), racing=config.racing, n_refine=config.refine,
        rule=ChoiceRule(config.objective, config.max_clean_drop / 100, config.min_gain, plain),
    )  # fmt: skip
    with live("pairs") as view:
        sweep = sweep_alphas(
            store, settings, on_block=view.begin, on_progress=view.advance,
            on_points=lambda points: view.show(show_sweep(points, plain, None)),
        )  # fmt: skip
        view.show(show_sweep(sweep.points, plain, sweep.chosen.alpha))
        chosen, by_rule = alphas_by_rule(config.alpha_rule, store, settings, sweep, checkpoint, view)
    if not console.is_terminal:
        console.print(show_sweep(sweep.points, plain, sweep.chosen.alpha))
    say_sweep(sweep, note)
    for line in by_rule.get("in_words", []):
        note(line)
    save_checkpoint(run.paths.checkpoint, chosen)
    results = sweep.to_report() | {
        "alpha": chosen.alpha, "alpha_rule": config.alpha_rule, "n_examples": len(y), "attacks": list(plain),
        "bpda_attacks": list(bpda), "estimator": calibrated["results"]["estimator"], **by_rule, **store.passes(),
    }  # fmt: skip
    draw_alpha_curve(
        results, title=f"{run.source.name}: {len(y):,} held-out images, {run.norm} {eps}", png=run.paths.curve_png, svg=run.paths.curve_svg
    )  # fmt: skip
    note(f"curve: {run.paths.curve_png}")
    return _write(run, "sweep-alpha", resolved, sources, inputs, [run.paths.checkpoint], device, started, results)


def evaluate(config: EvaluateConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Base and sparsified model under the same attacks on the same test images, judged afresh."""
    from .attacks import expand_attacks
    from .eps_sweep import draw_eps_curve, eps_rows, eps_state_folder, eps_table, evaluate_each_eps, headline_eps
    from .evaluate import EvaluateSettings, evaluate_robustness
    from .evaluation_table import doubts_view, evaluation_table, progress_table
    from .published import published_note, published_results

    run, started = _located(config), time.monotonic()
    alpha, upstream = _alpha_in_use(run, config.alpha)
    eps = _eps(run, config)
    attacks = tuple(expand_attacks(config.attack))
    indices, x, y = _examples(run, config, "test", config.n_examples)
    checkpoint = _checkpoint_to_evaluate(run, config, upstream)
    statistics, weights = sha256_of(run.paths.statistics) + checkpoint.options_id(), _weights_id(run)
    inputs = {
        f"{upstream}.yaml": sha256_of(run.paths.report(upstream)),
        "images": _images_id(run, config, "test", len(y)),
    }
    resolved = config.model_copy(update={"eps": eps, "norm": run.norm, "alpha": alpha, "n_examples": len(y)})
    if done := _finished("evaluate", run, resolved, inputs, fresh):
        return done

    device = pick_device(config.device)
    base = _load_base(run, config, device, checkpoint.rule)
    _check_logits(base, run, config, x[:2].to(device))
    model = sparsify(base, checkpoint, alpha=alpha)
    grid = eps_grid(eps)
    eps = headline_eps(grid, run.source.dataset, run.norm)
    settings = EvaluateSettings(
        attacks=attacks, norm=run.norm, eps=eps_value(eps), n_examples=len(y), seed=config.seed,  # type: ignore[arg-type]
        batch_size=config.batch_size, device=device, individual=config.individual, precision=config.precision,
        compile=config.compile,
        channels_last=device == "cpu" or config.precision != "fp32" if config.channels_last is None else config.channels_last,
    )  # fmt: skip
    state_folder = run.paths.state / "evaluate"
    if fresh:
        shutil.rmtree(state_folder, ignore_errors=True)
    with live("examples") as view:
        evaluations = evaluate_each_eps(
            lambda one, smaller: evaluate_robustness(
                model, x.to(device), y.to(device), indices, alpha=alpha, settings=replace(settings, eps=eps_value(one)),
                state_folder=eps_state_folder(state_folder, one, eps),
                fingerprint={"weights": str(weights), "statistics": statistics},
                n_classes=_n_classes(base, x[:2].to(device)), on_update=progress_table(view), smaller=smaller,
            ),
            grid,
        )  # fmt: skip
    evaluation = evaluations[eps]
    found = evaluation.to_report()
    console.print(evaluation_table(found, f"{run.source.name}, alpha {alpha:g}, {len(y):,} test images, {run.norm} {eps}", width=console.width))  # fmt: skip
    published = published_results(run.source)
    if line := published_note(published):
        note(line)
    evaluation.save_outcomes(run.paths.outcomes)
    outputs = [run.paths.outcomes]
    if config.save_witnesses:
        folders = [eps_state_folder(state_folder, one, eps) for one in grid if eps_value(one) <= eps_value(eps)]
        outputs += _save_witnesses(run, config, model, evaluation, folders, settings, (x, y, indices))
    if config.doubts:
        found["doubts"] = _doubts(model, x, y, indices, evaluation, settings, config.n_doubt_examples)
        console.print(doubts_view(found))
    results = (
        found
        | published
        | {
            "eps": eps,
            "search": {
                "precision": settings.precision,
                "compile": settings.compile,
                "channels_last": settings.channels_last,
            },
        }
    )
    if len(grid) > 1:
        console.print(eps_table(evaluations))
        results["eps_curve"] = eps_rows(evaluations)
        draw_eps_curve(
            evaluations, norm=run.norm, title=f"{run.source.name}, alpha {alpha:g}, {len(y):,} test images, worst case",
            png=run.paths.folder / "eps-curve.png", svg=run.paths.folder / "eps-curve.svg",
        )  # fmt: skip
        note(f"curve: {run.paths.folder / 'eps-curve.png'}")
    return _write(run, "evaluate", resolved, sources, inputs, outputs, device, started, results)


def _doubts(
    model: SparsifiedModel, x: Tensor, y: Tensor, indices: Tensor, evaluation: Evaluation, settings: EvaluateSettings,
    n_examples: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """What ``evaluate.yaml`` holds under ``doubts``, from the first ``n_examples``."""
    from .attacks.result import Budget
    from .doubts import find_doubts

    n, device = min(n_examples, len(y)), settings.device
    with live("kinds of doubt") as view:
        view.begin(f"doubts, on {n} examples", None)

        def on_kind(name: str, kind: str) -> None:
            view.begin(f"doubts about {kind} of {name}, on {n} examples", None)

        found = find_doubts(
            model, x[:n].to(device), y[:n].to(device), indices[:n], evaluation,
            budget=Budget(settings.norm, settings.eps), seed=settings.seed, batch_size=settings.batch_size,
            n_classes=_n_classes(model, x[:2].to(device)), on_kind=on_kind,
        )  # fmt: skip
    return [doubt.to_report() for doubt in found]


def _save_witnesses(
    run: Run, config: EvaluateConfig, model: SparsifiedModel, evaluation: Evaluation, folders: list[Path],
    settings: EvaluateSettings, examples: tuple[Tensor, Tensor, Tensor],
) -> list[Path]:  # fmt: skip
    """``witnesses.safetensors``, and a ``.pt`` for each model the size of the test set; returns the files."""
    from .witnesses import collect_witnesses, save_external, save_witnesses

    x, y, indices = examples
    witnesses = collect_witnesses(model, x, y, evaluation, folders, settings)
    files = [run.paths.folder / "witnesses.safetensors"]
    save_witnesses(files[0], witnesses, indices, norm=settings.norm, eps=settings.eps, alpha=evaluation.alpha)
    test = _load_split(run, config, "test")
    for name, found in witnesses.items():
        file = run.paths.folder / f"witnesses-{name}.pt"
        if save_external(file, test, found):
            files.append(file)
    note(
        f"witnesses: {', '.join(f'{len(found.images):,} on {name}' for name, found in witnesses.items())} ({files[0]})"
    )
    return files


def verify(config: VerifyConfig, sources: dict[str, str], file: Path) -> tuple[Path, bool]:
    """Judge the images of a file afresh, whoever made them; returns the report, and whether all of them are admissible."""
    from .attacks.result import Budget
    from .data import content_id
    from .verify import Judgement, judge_images, match_examples, read_images, show_judgements
    from .witnesses import examples_at

    run, started = _ensure_fetched(config, sources), time.monotonic()
    eps = _eps(run, config)
    budget = Budget(run.norm, eps_value(eps))  # type: ignore[arg-type]
    image_sets = read_images(file)
    test = _load_split(run, config, "test")
    device = pick_device(config.device)
    model: nn.Module
    if run.paths.report("calibrate").exists() and (config.alpha is not None or _has_alpha(run)):
        checkpoint = _checkpoint_in_use(run, config.alpha)
        alpha = float(checkpoint.alpha or 0)
        model = sparsify(_load_base(run, config, device, checkpoint.rule), checkpoint)
    else:
        alpha, model = 0.0, _load_base(run, config, device)
        note(f"verify: {run.paths.folder} has no alpha yet, so the base model alone is judged")
    judgements: list[Judgement] = []
    for images in image_sets:
        matched = match_examples(images, test, str(file))
        x, y = examples_at(test, matched.evaluated)
        if not judgements:
            _check_data(model, run, config, test, x[:2].to(device))
        judgements.append(
            judge_images(matched, x, y, model, alpha, budget, batch_size=config.batch_size, device=device)
        )
    title = f"{file}: {run.source.name}, {run.norm} {eps}" + (f", alpha {alpha:g}" if alpha else "")
    console.print(show_judgements(judgements, title))
    path = run.paths.folder / f"verify-{_file_name(file.stem)}.yaml"
    inputs = {file.name: sha256_of(file), "images": content_id(test)}
    resolved = config.model_copy(update={"eps": eps, "norm": run.norm, "alpha": alpha})
    report = write_report(
        path, stage="verify", config=_config_block(resolved, sources), inputs=inputs, outputs={},
        results=_plain({"admissible": all(j.is_admissible for j in judgements), "sets": [j.to_report() for j in judgements]}),
        device=device, seconds=time.monotonic() - started,
    )  # fmt: skip
    return path, bool(report["results"]["admissible"])


def export(folder: Path, file: Path | None, *, format: str, alpha: float | None, allow_pickle: bool) -> Path:
    """A run's sparsified model as one file, of a ``format`` of ``export.py``; returns its path.

    ``alpha`` overrides the one in use. A card needs the evaluation to be of this very alpha.
    """
    from . import export as formats
    from .models import network_settings
    from .site_rules import among_published
    from .sparsify import check_alpha

    suffixes = {"meansparse": ".safetensors", "robustbench": ".pt", "card": ".json"}
    if format not in suffixes:
        raise ConfigError(f"format is {format!r}", hint=f"one of {', '.join(suffixes)}")
    config = ModelConfig(run=folder, allow_pickle=allow_pickle)
    run = _located(config)
    if alpha is not None:
        check_alpha(alpha)
    checkpoint = _checkpoint_in_use(run, alpha)
    value = float(checkpoint.alpha or 0)
    path = file or folder / _file_name(f"{run.source.name}-meansparse{suffixes[format]}")
    if format == "card":
        evaluation = _evaluation_of(run, value)
        formats.save_card(path, formats.model_card(run.source, run.norm, checkpoint, evaluation))
        total, n = formats.n_test_images(run.source), evaluation["results"]["n_examples"] if evaluation else 0
        if total and n < total:
            note(
                f"export: a leaderboard asks for all {total:,} test images, these figures are of {n:,}: {run.command('evaluate')} --n-examples {total}"
            )
        note("export: link, name, authors and venue are yours to fill in")
        return path
    base = _load_base(run, config, "cpu", checkpoint.rule)
    if format == "robustbench":
        formats.save_robustbench(path, run.source, sparsify(base, checkpoint))
    else:
        network = {
            "published_sites": among_published(checkpoint.rule) is not None,
            "settings": network_settings(run.source, _weights_of(run)),
        }
        formats.save_exported(path, run.source, base, checkpoint, network)
    note(f"export: {run.source.name}, {len(checkpoint.sites)} sites, alpha {value:g}, {path.stat().st_size:,} bytes")
    return path


def load_sparsified(run: str | Path, *, alpha: float | None = None, device: str = "cpu") -> SparsifiedModel:
    """The sparsified model of a finished sweep, ready to use: an ``nn.Module`` in eval mode, images in, logits out.

    ``run`` is the run folder, or one file written by ``meansparse export``. ``alpha`` overrides the chosen one; 0 is
    bit-identical to the base model.
    """
    if Path(run).is_file():
        from .export import load_exported

        return load_exported(Path(run), alpha=alpha, device=device)
    located = locate_run(ModelConfig(run=Path(run)))
    checkpoint = _checkpoint_in_use(located, None if located.paths.report("sweep-alpha").exists() else alpha)
    base = _load_base(located, ModelConfig(run=Path(run)), device, checkpoint.rule)
    return sparsify(base, checkpoint, alpha=alpha)


def _with_model_of_file(config: FetchConfig, path: Path) -> FetchConfig:
    """A file of the authors says by its keys which model it is, so that no --model is needed."""
    from .published_checkpoint import read_published

    held = read_published(path, allow_pickle=config.allow_pickle) if path.is_file() else None
    if held is None or held.file is None:
        raise ConfigError(
            f"{path} is not a file of the MeanSparse authors, so it does not say which model it is",
            hint="name its model: --model NAME",
        )
    file = held.file
    update = {"model": file.entry or file.base, "dataset": file.dataset, "threat": file.threat}
    return config.model_copy(update=update)


def plot(config: PlotConfig, sources: dict[str, str]) -> Path:
    """A picture of a finished sweep into ``plots/`` of the run folder, PNG and SVG; returns the PNG."""
    from .curve import draw_alpha_curve
    from .plots import blocked_shares, channel_values, draw_blocked, draw_histogram, site_called

    run = _located(config)
    results = _verified(run, "sweep-alpha")["results"]
    folder = run.paths.folder / "plots"
    if config.what == "curve":
        png, svg = folder / "curve.png", folder / "curve.svg"
        draw_alpha_curve(
            results, title=f"{run.source.name}: {results['n_examples']:,} held-out images", png=png, svg=svg
        )
        return png
    device = pick_device(config.device)
    checkpoint = load_checkpoint(run.paths.checkpoint)
    model = sparsify(_load_base(run, config, device, checkpoint.rule), checkpoint, alpha=config.alpha)
    alpha = checkpoint.alpha if config.alpha is None else config.alpha
    clamp = sources.get("n_examples", "default") == "default"
    _, x, _ = _examples(run, config, "held-out", config.n_examples, clamp=clamp)
    x, title = x.to(device), f"{run.source.name}, alpha = {alpha:g}, {len(x):,} held-out images"
    if config.what == "blocked":
        png, svg = folder / "blocked.png", folder / "blocked.svg"
        draw_blocked(blocked_shares(model, x, batch_size=config.batch_size), model.sites, title=title, png=png, svg=svg)
        return png
    site = model.sites[0] if config.site is None else site_called(model.sites, config.site)
    values = channel_values(model, site, config.channel, x, batch_size=config.batch_size)
    name = _file_name(f"histogram-{site.name}-{config.channel}")
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    draw_histogram(values, title=f"{title}\n{site.name}, channel {config.channel}", png=png, svg=svg)
    return png


def pick_device(name: str) -> str:
    """``auto`` is the first GPU, else the CPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {error}", hint="--device auto, cpu or cuda:0") from error
    return name


# ---- what the stages share


def _ensure_fetched(config: CalibrateConfig | VerifyConfig, sources: dict[str, str]) -> Run:
    """Calibrate and sites take a model by name: it is fetched first where that was not done."""
    run = locate_run(config)
    if config.weights is not None or not run.paths.report("fetch").exists():
        wanted = {key: getattr(config, key) for key in ModelConfig.model_fields}
        fetch(FetchConfig(**wanted), sources)
    return _located(config)


def _located(config: ModelConfig) -> Run:
    """The run, once its folder is known to be of this model; its weights must still be the ones that were fetched."""
    run = locate_run(config)
    report = read_report(run.paths.report("fetch"), "fetch", mend=run.command("fetch"))
    held = report["results"]["model"]
    if held != asdict(run.source):
        raise ArtifactError(
            f"{run.paths.folder} is a run of {held['name']} ({held['dataset']}), not of {run.source.name} ({run.source.dataset})",
            hint="choose another folder: --run DIR",
        )
    return run


def _verified(run: Run, stage: str) -> dict[str, Any]:
    """The report of ``stage`` with its whole chain checked back to fetch."""
    order = ["fetch", "calibrate", "sweep-alpha"]
    report: dict[str, Any] = {}
    for i, name in enumerate(order[: order.index(stage) + 1]):
        mend = run.command(name)
        report = read_report(run.paths.report(name), name, mend=mend)
        verify_outputs(report, run.paths.folder, mend=mend)
        if i and report["inputs"][f"{order[i - 1]}.yaml"] != sha256_of(run.paths.report(order[i - 1])):
            raise ArtifactError(
                f"{name}.yaml was made from another {order[i - 1]}.yaml than the one in {run.paths.folder}",
                hint=f"run: {mend}",
            )
    return report


def _alpha_in_use(run: Run, given: float | None) -> tuple[float, str]:
    """Alpha, and the stage it comes from: the one given, the sweep's, or the one stored in a published checkpoint."""
    if given is not None:
        _verified(run, "calibrate")
        return given, "calibrate"
    if run.paths.report("calibrate").exists() and not run.paths.report("sweep-alpha").exists():
        stored = _verified(run, "calibrate")["results"].get("alpha")
        if stored is not None:
            return float(stored), "calibrate"
    return float(_verified(run, "sweep-alpha")["results"]["alpha"]), "sweep-alpha"


def _has_alpha(run: Run) -> bool:
    """Was one chosen by a sweep, or stored in a published checkpoint?"""
    if run.paths.report("sweep-alpha").exists():
        return True
    return _verified(run, "calibrate")["results"].get("alpha") is not None


def _evaluation_of(run: Run, alpha: float) -> dict[str, Any] | None:
    """The report of evaluate, if there is one; refused where it is of other statistics or of another alpha."""
    path = run.paths.report("evaluate")
    if not path.exists():
        note(f"export: not evaluated, so the card has no figures: {run.command('evaluate')}")
        return None
    report = read_report(path, "evaluate", mend=run.command("evaluate"))
    upstream = next(name for name in ("sweep-alpha", "calibrate") if f"{name}.yaml" in report["inputs"])
    if report["inputs"][f"{upstream}.yaml"] != sha256_of(run.paths.report(upstream)):
        raise ArtifactError(
            f"evaluate.yaml was made from another {upstream}.yaml than the one in {run.paths.folder}",
            hint=f"run: {run.command('evaluate')}",
        )
    if report["results"]["alpha"] != alpha:
        raise ArtifactError(
            f"evaluate.yaml is of alpha {report['results']['alpha']:g}, this is a card for alpha {alpha:g}",
            hint=f"evaluate this one, or export that one: --alpha {report['results']['alpha']:g}",
        )
    return report


def _checkpoint_in_use(run: Run, given: float | None) -> Checkpoint:
    """The operators that evaluate would use, with their alpha."""
    alpha, stage = _alpha_in_use(run, given)
    file = run.paths.checkpoint if stage == "sweep-alpha" else run.paths.statistics
    return replace(load_checkpoint(file), alpha=alpha)


def _with_site_rule(run: Run, config: CalibrateConfig, sources: dict[str, str]) -> CalibrateConfig:
    """A model that has operators of its own, and statistics that are stored, mean the authors' sites by default."""
    from .published_checkpoint import published_architecture
    from .site_rules import PUBLISHED, among_published

    if among_published(config.sites) is not None:
        return config
    has_operators = run.source.kind == "zoo" and published_architecture(run.source.entry) == run.source.entry
    if sources.get("sites", "default") == "default" and (has_operators or config.statistics == "stored"):
        return config.model_copy(update={"sites": PUBLISHED})
    if config.statistics == "stored":
        raise ConfigError(
            f"--sites {config.sites} with --statistics stored: a checkpoint stores those of the authors' sites only",
            hint=f"choose among them: --sites {PUBLISHED}:{config.sites}",
        )
    return config


def _find_sites(model: nn.Module, run: Run, config: CalibrateConfig, images: Tensor) -> list[Site]:
    """The sites that the rule chooses among."""
    from .adopt import published_sites
    from .published_checkpoint import published_files_of
    from .site_rules import among_published
    from .sites import find_sites

    if among_published(config.sites) is None:
        return find_sites(model, images)
    known = published_files_of(run.source.entry) if run.source.kind == "zoo" else []
    return published_sites(model, images, _held_by_weights(run, config), [m.pattern for m in known])


def _held_by_weights(run: Run, config: ModelConfig) -> PublishedCheckpoint | None:
    """The published operators in the run's weights, if these are a file that has them."""
    from .published_checkpoint import read_published

    paths = _weights_of(run)
    if run.source.kind != "zoo" or len(paths) != 1:
        return None
    return read_published(paths[0], allow_pickle=config.allow_pickle)


def _load_base(run: Run, config: ModelConfig, device: str, rule: str = "all") -> nn.Module:
    """The base model; its architecture has places for the authors' operators where the site rule speaks of them."""
    from .models import load_model
    from .site_rules import among_published

    model = load_model(
        run.source, _weights_of(run) or None, allow_pickle=config.allow_pickle,
        published_sites=among_published(rule) is not None,
    )  # fmt: skip
    return model.to(device).eval()


def _weights_of(run: Run) -> list[Path]:
    """The files that fetch recorded, unchanged since."""
    paths = []
    for file in read_report(run.paths.report("fetch"), "fetch", mend=run.command("fetch"))["results"]["files"]:
        path = Path(file["path"])
        if not path.exists():
            raise ArtifactError(f"the weights {path} are gone", hint=f"run: {run.command('fetch')}")
        if sha256_of(path) != file["sha256"]:
            raise ArtifactError(
                f"the weights {path} changed since they were fetched", hint=f"run: {run.command('fetch')} --fresh"
            )
        paths.append(path)
    return paths


def _with_options(statistics: Checkpoint, config: SweepAlphaConfig | EvaluateConfig) -> Checkpoint:
    """The statistics with the sites, the centre and the spread that the settings ask for."""
    weights = None
    if config.sites != "all":
        from .site_rules import among_published, select_sites

        rule = among_published(config.sites) or config.sites
        used = {site.index for site in select_sites(list(statistics.sites), rule)}
        if len(used) < len(statistics.sites):
            weights = tuple(float(site.index in used) for site in statistics.sites)
    return replace(statistics, site_weights=weights, centre=config.centre, spread=config.spread)


def _checkpoint_to_evaluate(run: Run, config: EvaluateConfig, upstream: str) -> Checkpoint:
    """What the sweep chose, sites and options included; without a sweep, the statistics as the settings say."""
    if upstream == "calibrate":
        return _with_options(load_checkpoint(run.paths.statistics), config)
    if (config.sites, config.centre, config.spread) != ("all", "channel-mean", "channel-std"):
        raise ConfigError(
            "--sites, --centre and --spread of evaluate go with --alpha: without it, the sweep's checkpoint decides",
            hint=f"give an alpha, or choose one with them: {run.command('sweep-alpha')} --centre {config.centre}",
        )
    return load_checkpoint(run.paths.checkpoint)


def _weights_id(run: Run) -> str | None:
    report = read_report(run.paths.report("fetch"), "fetch", mend=run.command("fetch"))
    return report["results"]["sha256"]  # type: ignore[no-any-return]


def _check_disjoint(run: Run, config: SweepAlphaConfig) -> None:
    """Refuse held-out images that are among those of the statistics or of the test split.

    The splits of one data set are disjoint by construction; they need not be where the sweep was given another one.
    """
    from .data import image_ids, load_split

    if config.dataset is None and config.data_dir is None:
        return
    before = read_report(run.paths.report("calibrate"), "calibrate", mend=run.command("calibrate"))["config"][
        "settings"
    ]
    dataset, data_dir = before["dataset"] or run.source.dataset, before["data_dir"] and Path(before["data_dir"])
    held_out = _load_split(run, config, "held-out")
    if not len(held_out):
        raise DataError("the held-out split is empty", hint="a data set of 10 training images or more has one")
    same_source = (config.dataset or run.source.dataset, config.data_dir or data_dir) == (dataset, data_dir)
    if same_source:
        return
    mine = image_ids(held_out)
    for split in ("calibration", "test"):
        n = len(mine & image_ids(load_split(dataset, data_dir, split)))  # type: ignore[arg-type]
        if n:
            raise DataError(
                f"{n} of {len(held_out)} held-out images are in the {split} split that this run was calibrated with",
                hint=f"sweep on the data set of the statistics (leave out --dataset and --data-dir), or run: {run.command('calibrate')} "
                "with the same --dataset and --data-dir",
            )


def _load_split(run: Run, config: StageConfig, split: SplitName) -> Subset[tuple[Tensor, int]]:
    from .data import load_split

    dataset, data_dir = config.dataset, config.data_dir
    if (
        isinstance(config, AttackConfig)
        and run.paths.report("calibrate").exists()
        and (dataset is None or data_dir is None)
    ):
        # what calibrate read is what the later stages mean, unless they say otherwise
        before = read_report(run.paths.report("calibrate"), "calibrate", mend=run.command("calibrate"))["config"][
            "settings"
        ]
        dataset = dataset or before["dataset"]
        data_dir = data_dir or (Path(before["data_dir"]) if before["data_dir"] else None)
    return load_split(dataset or run.source.dataset, data_dir, split)


def _examples(
    run: Run, config: StageConfig, split: SplitName, n: int | None, *, clamp: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions in the data set, images and labels of the first n of a split's seeded order."""
    import torch

    from .data import stack_examples, take_examples

    images = _load_split(run, config, split)
    if clamp and n is not None and n > len(images):
        n = len(images)
    chosen = take_examples(images, n, seed=config.seed)
    if not len(chosen):
        raise DataError(f"the {split} split is empty")
    x, y = stack_examples(chosen)
    return torch.tensor(list(chosen.indices)), x, y


def _images_id(run: Run, config: StageConfig, split: SplitName, n: int) -> str:
    from .data import content_id, take_examples

    return content_id(take_examples(_load_split(run, config, split), n, seed=config.seed))


def _check_data(model: nn.Module, run: Run, config: StageConfig, images: Any, batch: Tensor) -> None:
    from .data import KNOWN_DATASETS, check_images

    facts = KNOWN_DATASETS.get(run.source.dataset)
    shape = facts.image_shape if facts is not None else tuple(batch.shape[1:])
    name = config.dataset or run.source.dataset
    check_images(images, images.dataset.n_classes, shape, name)
    check_images(images, _n_classes(model, batch), shape, name)


def _check_logits(model: nn.Module, run: Run, config: StageConfig, batch: Tensor) -> None:
    _check_data(model, run, config, _load_split(run, config, "test"), batch)


def _n_classes(model: nn.Module, batch: Tensor) -> int:
    import torch

    with torch.no_grad():
        try:
            logits = model(batch)
        except Exception as error:  # the user's code may raise anything
            raise DataError(
                f"the model's forward pass fails on images of shape {tuple(batch.shape[1:])}: {error}",
                hint="does the data set's image size fit this model?",
            ) from error
    if logits.ndim != 2 or len(logits) != len(batch):
        raise DataError(f"the model gives {tuple(logits.shape)} for {len(batch)} images; expected (batch, classes)")
    return int(logits.shape[1])


def _eps(run: Run, config: AttackConfig) -> str:
    from .data import KNOWN_DATASETS

    facts = KNOWN_DATASETS.get(run.source.dataset)
    eps = config.eps or (facts.eps[run.norm] if facts is not None else None)
    if eps is None:
        raise ConfigError("no eps is known for this data set", hint="give one: --eps 8/255")
    for one in eps_grid(eps):
        check_eps(one, run.norm)
    return eps


def _finished(stage: str, run: Run, config: ModelConfig, inputs: dict[str, str], fresh: bool) -> Path | None:
    """The report, if this very stage was already done with these settings and inputs."""
    path = run.paths.report(stage)
    if fresh or not path.exists():
        return None
    report = read_report(path, stage, mend=run.command(stage))
    before, now = report["config"]["settings"], _plain(config.model_dump(mode="json"))
    changed = [key for key in now if key not in _NOT_IN_RESULT and before.get(key) != now[key]]
    if changed or report["inputs"] != inputs:
        what = ", ".join(f"{key}: {before.get(key)} -> {now[key]}" for key in changed) or "its inputs"
        note(f"{stage}: was done before with other settings ({what}); doing it anew")
        return None
    verify_outputs(report, run.paths.folder, mend=run.command(stage))
    note(f"{stage}: already done, nothing to do ({path}); --fresh does it again")
    return path


def _write(
    run: Run, stage: str, config: ModelConfig, sources: dict[str, str], inputs: dict[str, str], outputs: list[Path],
    device: str, started: float, results: dict[str, Any],
) -> Path:  # fmt: skip
    path = run.paths.report(stage)
    write_report(
        path, stage=stage, config=_config_block(config, sources), inputs=inputs,
        outputs={file.name: sha256_of(file) for file in outputs}, results=_plain(results), device=device,
        seconds=time.monotonic() - started,
    )  # fmt: skip
    return path


def _config_block(config: ModelConfig, sources: dict[str, str]) -> dict[str, Any]:
    settings = {k: v for k, v in _plain(config.model_dump(mode="json")).items() if k not in _NOT_IN_REPORT}
    return {"settings": settings, "from": {k: v for k, v in sources.items() if k in settings and v != "default"}}


def _site_row(site: Site, count: int) -> dict[str, Any]:
    return {
        "index": site.index, "name": site.name, "operation": site.operation, "kind": site.kind, "layout": site.layout,
        "channels": site.channels, "gate": site.gate, "after_addition": site.after_addition, "main_path": site.main_path,
        "count": count,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """Only what YAML and JSON know: no tuples, paths or numpy numbers."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") and not isinstance(value, str) else value


def _norm_of(threat: str) -> str:
    return "L2" if threat == "L2" else "Linf"


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in text)


@contextmanager
def run_folder_lock(folder: Path) -> Iterator[None]:
    """One writer a run folder: a second command on the same folder is refused while the first one runs."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(
                f"another command is at work in {folder}", hint="wait for it, or use another --run"
            ) from error
        yield
