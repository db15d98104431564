"""The four stages in order: what each reads, does and writes. Read this file first.

    fetch        a model name                 -> weights in the cache, fetch.yaml
    calibrate    model, calibration split     -> statistics.safetensors, calibrate.yaml
    sweep-alpha  + held-out split             -> meansparse.safetensors, curve, sweep-alpha.yaml
    evaluate     + test split                 -> outcomes.npz, evaluate.yaml

Every stage verifies the reports before it (each names its inputs by sha256), checks everything it can before it computes,
writes its report last and atomically, and returns it at once if the same was already done. The fourth, the longest, is in
``evaluate_command.py``.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError, ConfigError, DataError
from ..files import discard, sha256_of
from ..operator.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, sparsify
from ..reporting.console import bar, console, live, note
from ..reporting.model_tables import show_sites
from ..runs.folder import Run, locate_run, located, verified, weights_id
from ..runs.images import (
    check_data,
    check_disjoint,
    check_logits,
    count_classes,
    examples,
    image_shape,
    images_id,
    load_images,
)
from ..runs.model import (
    checkpoint_in_use,
    eps_of,
    held_by_weights,
    load_base,
    pick_device,
    sites_of_rule,
    with_options,
    with_site_rule,
)
from ..runs.report import read_report, write_report
from ..runs.stage_report import config_block, finished, plain, site_row, write_stage
from ..settings.stages import CalibrateConfig, FetchConfig, ModelConfig, SweepAlphaConfig, VerifyConfig
from ..settings.values import eps_value
from .evaluate import evaluate

if TYPE_CHECKING:
    from ..operator.sparsify import SparsifiedModel
    from ..sites.find import Site

__all__ = ["calibrate", "ensure_fetched", "evaluate", "fetch", "list_sites", "load_sparsified", "sweep_alpha"]


def fetch(config: FetchConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Weights of the model into the cache; ``fetch.yaml`` into the run folder."""
    from ..models.fetch import cache_folder, fetch_weights
    from ..models.source import load_model
    from ..models.weights import network_id

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
    sha256 = fetched[0].sha256 if fetched else None
    if not fetched or config.weights is not None:
        # what nobody has checked yet: that the factory is there, and that the weights are this network's
        model = load_model(run.source, [file.path for file in fetched] or None, allow_pickle=config.allow_pickle)
        sha256 = sha256 or network_id(model)
    results = {
        "model": asdict(run.source),
        "sha256": sha256,
        "size": sum(file.size for file in fetched),
        "files": [plain(asdict(file)) for file in fetched],
    }
    if report_file.exists() and not fresh:
        before = read_report(report_file, "fetch", mend=run.command("fetch"))["results"]
        if before == results:
            note(f"fetch: {run.source.name} is already there")
            return report_file
        if before["files"] and not results["files"]:
            raise ArtifactError(
                f"{run.paths.folder} is about weights from {before['files'][0]['origin']}, and none are given now",
                hint="give them again: --weights FILE; or start anew without them: --fresh",
            )
        if before["model"] != results["model"]:
            raise ArtifactError(
                f"{run.paths.folder} is a run of {before['model']['name']}, not of {run.source.name}",
                hint="choose another folder: --run DIR",
            )
    write_report(
        report_file, stage="fetch", config=config_block(config, sources), inputs={}, outputs={}, results=results,
        device="cpu", seconds=time.monotonic() - started,
    )  # fmt: skip
    origin = ", ".join(file.origin for file in fetched)
    came = f"{results['size']:,} bytes from {origin}" if origin else "with the weights that the factory gives it"
    note(f"fetch: {run.source.name}, {came}")
    return report_file


def list_sites(config: CalibrateConfig, sources: dict[str, str]) -> tuple[list[Site], dict[int, str]]:
    """Every site, gates included and marked; and by index, for those that calibrate would use, what chose them."""
    import torch

    from ..sites.rules import chosen_by

    run = ensure_fetched(config, sources)
    config = with_site_rule(run, config, sources)
    model = load_base(run, config, "cpu", config.sites)
    if (shape := image_shape(run, config)) is not None:
        images = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    else:
        _, images, _ = examples(run, config, "calibration", 2)
    found = sites_of_rule(model, run, config, images)
    return found, chosen_by(found, config.sites, include_gates=config.include_gates)


def calibrate(config: CalibrateConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """One pass over the calibration split: mean and standard deviation of each channel at each site."""
    from ..data.datasets import content_id, stack_examples, take_examples
    from ..models.source import kind_of
    from ..operator.calibration import calibrate_channels
    from ..sites.rules import chosen_by, select_sites

    run, started = ensure_fetched(config, sources), time.monotonic()
    config = with_site_rule(run, config, sources)
    if config.statistics == "stored":
        return _take_stored(run, config, sources, fresh)
    if config.fraction is not None and config.n_examples is not None:
        raise ConfigError("both --fraction and --n-examples were given", hint="give one of them")
    images = load_images(run, config, "calibration")
    n = config.n_examples if config.fraction is None else max(1, round(config.fraction * len(images)))
    if not len(images):
        raise DataError("the calibration split is empty", hint="is this the folder of a data set? --data-dir DIR")
    images = take_examples(images, n, seed=config.seed)
    inputs = {"fetch.yaml": sha256_of(run.paths.report("fetch")), "images": content_id(images)}
    if done := finished("calibrate", run, config, inputs, fresh):
        return done

    if fresh:
        (run.paths.state / "calibrate.pt").unlink(missing_ok=True)
    device = pick_device(config.device)
    model = load_base(run, config, device, config.sites)
    first, _ = stack_examples(take_examples(images, min(len(images), 4)))
    check_data(model, run, config, images, first.to(device))
    found = sites_of_rule(model, run, config, first.to(device))
    sites = select_sites(found, config.sites, include_gates=config.include_gates)
    console.print(show_sites(found, chosen_by(found, config.sites, include_gates=config.include_gates)))
    with bar("calibrating", len(images)) as advance:
        statistics = calibrate_channels(
            model, sites, images, batch_size=config.batch_size, estimator=config.estimator, device=device,
            n_workers=config.workers, state_file=run.paths.state / "calibrate.pt",
            fingerprint=inputs | {
                "batch_size": config.batch_size, "estimator": config.estimator, "sites": [s.name for s in sites],
                "preprocessing": repr(kind_of(run.source).preprocessing(config.preprocessing)),
            },
            on_batch=advance,
        )  # fmt: skip
    save_checkpoint(
        run.paths.statistics, Checkpoint(tuple(sites), tuple(statistics), config.estimator, rule=config.sites)
    )
    report = write_stage(
        run, "calibrate", config, sources, inputs, [run.paths.statistics], device, started,
        {
            "n_images": len(images),
            "estimator": config.estimator,
            "rule": config.sites,
            "n_sites_found": len(found),
            "n_gates_left_out": 0 if config.include_gates else sum(site.gate for site in found),
            "sites": [site_row(site, s.count) for site, s in zip(sites, statistics, strict=True)],
        },
    )  # fmt: skip
    (run.paths.state / "calibrate.pt").unlink(missing_ok=True)
    note(f"calibrate: {len(sites)} sites, {len(images):,} images, {time.monotonic() - started:.1f} s")
    return report


def _take_stored(run: Run, config: CalibrateConfig, sources: dict[str, str], fresh: bool) -> Path:
    """Calibrate without images: the operators that a published checkpoint holds are taken as they are, alpha included."""
    import torch

    from ..sites.rules import chosen_by, select_sites

    started, inputs = time.monotonic(), {"fetch.yaml": sha256_of(run.paths.report("fetch"))}
    if done := finished("calibrate", run, config, inputs, fresh):
        return done
    held = held_by_weights(run, config)
    if held is None:
        raise ConfigError(
            f"the weights of {run.source.name} hold no MeanSparse operators, so no statistics are stored in them",
            hint="measure them: leave --statistics out",
        )
    if not any(bool(s.std.any()) for s in held.statistics.values()):
        raise ConfigError(
            "the statistics that the weights hold are all zero", hint="measure them: leave --statistics out"
        )
    model = load_base(run, config, "cpu", config.sites)
    shape = image_shape(run, config)
    assert shape is not None  # a published checkpoint is one of a known data set
    found = sites_of_rule(model, run, config, torch.rand((2, *shape)))
    sites = select_sites(found, config.sites)
    console.print(show_sites(found, chosen_by(found, config.sites)))
    paths = [str(held.path_of(site.path)) for site in sites]
    statistics = tuple(held.statistics[path] for path in paths)
    checkpoint = Checkpoint(tuple(sites), statistics, "published", held.alpha, rule=config.sites)
    save_checkpoint(run.paths.statistics, checkpoint)
    known = held.file
    report = write_stage(
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
            "sites": [site_row(site, s.count) for site, s in zip(sites, statistics, strict=True)],
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
    from ..attacks.precision import precision_on
    from ..attacks.result import Budget
    from ..engine.evaluation import attacks_id
    from ..engine.pair_attack import PairSettings
    from ..engine.pairs import PairStore
    from ..reporting.alpha_curve import draw_alpha_curve
    from ..reporting.sweep_tables import say_sweep, show_sweep
    from ..selection.choice import ChoiceRule
    from ..selection.rules import alphas_by_rule
    from ..selection.search import check_blocks
    from ..selection.sweep import SweepSettings, families_of, grid_of, sweep_alphas

    run, started = located(config), time.monotonic()
    calibrated = verified(run, "calibrate")
    eps = eps_of(run, config)
    plain, bpda = families_of(config.attack, config.objective)
    alphas, changes = grid_of(config.alphas)
    if changes and sources.get("alphas") != "default":
        note(f"alphas: {changes}: {', '.join(f'{alpha:g}' for alpha in alphas)}")
    check_disjoint(run, config)
    indices, x, y = examples(run, config, "held-out", config.n_examples, clamp=sources.get("n_examples") == "default")
    inputs = {
        "calibrate.yaml": sha256_of(run.paths.report("calibrate")),
        "images": images_id(run, config, "held-out", len(y)),
        "attacks": attacks_id((*plain, *bpda)),
    }
    resolved = config.model_copy(update={"eps": eps, "norm": run.norm, "alphas": alphas, "n_examples": len(y)})
    if done := finished("sweep-alpha", run, resolved, inputs, fresh):
        return done

    device = pick_device(config.device)
    checkpoint = with_options(load_checkpoint(run.paths.statistics), config)
    base = load_base(run, config, device, checkpoint.rule)
    check_logits(base, run, config, x[:2].to(device))
    model = sparsify(base, checkpoint, alpha=0.0)
    if fresh:
        discard(run.paths.state / "sweep-alpha")
    n_classes, budget = count_classes(base, x[:2].to(device)), Budget(run.norm, eps_value(eps))  # type: ignore[arg-type]
    precision = precision_on(device, config.precision)
    store = PairStore(
        model, x.to(device), y.to(device), indices,
        PairSettings(budget, config.seed, config.batch_size, n_classes, precision),
        plain=plain, bpda=bpda, folder=run.paths.state / "sweep-alpha", block_size=config.block_size,
        key={
            "statistics": sha256_of(run.paths.statistics), "weights": weights_id(run), "options": checkpoint.options_id(),
            "images": f"{config.dataset or run.source.dataset} held-out",
            # not where it is fp32, so that what a sweep on a CPU began before this was a setting goes on
            **({} if precision == "fp32" else {"precision": precision}),
        },
    )  # fmt: skip
    settings = SweepSettings(
        alphas=alphas, site_weights=(1.0,) * len(model.sites), racing=config.racing, n_refine=config.refine,
        rule=ChoiceRule(config.objective, config.max_clean_drop / 100, config.min_gain, plain),
    )  # fmt: skip
    if config.alpha_rule != "shared":
        check_blocks(len(y), config.block_size)
    with live("pairs") as view:
        sweep = sweep_alphas(
            store, settings, on_block=view.begin, on_progress=view.advance,
            on_points=lambda points: view.show(show_sweep(points, plain, None)),
        )  # fmt: skip
        view.show(show_sweep(sweep.points, plain, sweep.chosen.alpha))
        sweep, chosen, by_rule = alphas_by_rule(
            config.alpha_rule, store, settings, sweep, checkpoint, on_block=view.begin, on_progress=view.advance
        )
        view.show(show_sweep(sweep.points, plain, sweep.chosen.alpha))
    if not console.is_terminal:
        console.print(show_sweep(sweep.points, plain, sweep.chosen.alpha))
    say_sweep(sweep, note)
    for line in by_rule.get("in_words", []):
        note(line)
    save_checkpoint(run.paths.checkpoint, chosen)
    results = sweep.to_report() | {
        "alpha": chosen.alpha, "alpha_rule": config.alpha_rule, "n_examples": len(y), "attacks": list(plain),
        "bpda_attacks": list(bpda), "precision": precision, "estimator": calibrated["results"]["estimator"], **by_rule, **store.passes(),
    }  # fmt: skip
    draw_alpha_curve(
        results, title=f"{run.source.name}: {len(y):,} held-out images, {run.norm} {eps}", png=run.paths.curve_png, svg=run.paths.curve_svg
    )  # fmt: skip
    note(f"curve: {run.paths.curve_png}")
    return write_stage(run, "sweep-alpha", resolved, sources, inputs, [run.paths.checkpoint], device, started, results)


def load_sparsified(
    run: str | Path,
    *,
    alpha: float | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    allow_code: bool = False,
) -> SparsifiedModel:
    """The sparsified model of a finished sweep, ready to use: an ``nn.Module`` in eval mode, images in, logits out.

    ``run`` is the run folder, or one file written by ``meansparse export``. ``alpha`` overrides the chosen one: as in
    ``evaluate --alpha`` and ``export --alpha`` at all calibrated sites, around the channel means, whatever the sweep had;
    0 is bit-identical to the base model. ``allow_pickle``: as ``fetch --allow-pickle``, for a run's weights that need code
    to load. ``allow_code``: import the ``module:factory`` that an exported file names as its network.
    """
    if Path(run).is_file():
        from ..models.export import load_exported

        return load_exported(Path(run), alpha=alpha, device=device, allow_code=allow_code)
    located = locate_run(ModelConfig(run=Path(run)))
    checkpoint = checkpoint_in_use(located, alpha)
    base = load_base(located, ModelConfig(run=Path(run), allow_pickle=allow_pickle), device, checkpoint.rule)
    return sparsify(base, checkpoint, alpha=alpha)


def ensure_fetched(config: CalibrateConfig | VerifyConfig, sources: dict[str, str]) -> Run:
    """Calibrate and sites take a model by name: it is fetched first where that was not done."""
    run = locate_run(config)
    if config.weights is not None or not run.paths.report("fetch").exists():
        wanted = {key: getattr(config, key) for key in ModelConfig.model_fields}
        fetch(FetchConfig(**wanted), sources)
    return located(config)
