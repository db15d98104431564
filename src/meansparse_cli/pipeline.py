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
    StageConfig,
    SweepAlphaConfig,
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
    known = held.model
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
        f"calibrate: {len(sites)} sites with the statistics of {held.model.file_name if held.model else 'the weights'}, {alpha}"
    )
    if held.alpha is None:
        theirs = f"the authors evaluate at {held.model.alpha:g}: " if held.model else ""
        note(f"{theirs}choose one with sweep-alpha, or give it: meansparse evaluate --alpha A --run {run.paths.folder}")
    return report


def sweep_alpha(config: SweepAlphaConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Clean and robust accuracy of each alpha on the held-out split; the chosen alpha's checkpoint."""
    from .attacks import expand_attacks
    from .attacks.result import Budget
    from .curve import draw_alpha_curve
    from .sweep_alpha import SweepSettings, choose_alpha, grid_of, show_sweep, sweep_alphas

    run, started = _located(config), time.monotonic()
    calibrated = _verified(run, "calibrate")
    eps = _eps(run, config)
    attacks = tuple(expand_attacks(config.attack))
    alphas = grid_of(config.alphas)
    indices, x, y = _examples(run, config, "held-out", config.n_examples, clamp=sources.get("n_examples") == "default")
    inputs = {
        "calibrate.yaml": sha256_of(run.paths.report("calibrate")),
        "images": _images_id(run, config, "held-out", len(y)),
    }
    resolved = config.model_copy(update={"eps": eps, "norm": run.norm, "alphas": alphas, "n_examples": len(y)})
    if done := _finished("sweep-alpha", run, resolved, inputs, fresh):
        return done

    device = pick_device(config.device)
    checkpoint = load_checkpoint(run.paths.statistics)
    base = _load_base(run, config, device, checkpoint.rule)
    _check_logits(base, run, config, x[:2].to(device))
    model = sparsify(base, checkpoint, alpha=0.0)
    settings = SweepSettings(
        alphas=alphas, attacks=attacks, budget=Budget(run.norm, eps_value(eps)), seed=config.seed,  # type: ignore[arg-type]
        batch_size=config.batch_size, n_classes=_n_classes(base, x[:2].to(device)),
    )  # fmt: skip
    if fresh:
        shutil.rmtree(run.paths.state / "sweep-alpha", ignore_errors=True)
    with live("examples") as view:
        points = sweep_alphas(
            model, x.to(device), y.to(device), indices, settings, state_folder=run.paths.state / "sweep-alpha",
            fingerprint=inputs | {"eps": eps, "norm": run.norm},
            on_point=lambda points: view.show(show_sweep(points, settings, None)),
            on_begin=lambda alpha, n: view.begin(f"alpha {alpha:g}", n), on_progress=view.advance,
        )  # fmt: skip
        chosen = choose_alpha(points, max_clean_drop=config.max_clean_drop / 100)
        view.show(show_sweep(points, settings, chosen.alpha))
    if not console.is_terminal:
        console.print(show_sweep(points, settings, chosen.alpha))
    note(chosen.reason)
    note(f"curve: {run.paths.curve_png}")
    save_checkpoint(
        run.paths.checkpoint,
        Checkpoint(checkpoint.sites, checkpoint.statistics, checkpoint.estimator, chosen.alpha, checkpoint.rule),
    )
    draw_alpha_curve(
        [point.for_curve() for point in points], chosen_alpha=chosen.alpha,
        title=f"{run.source.name}: {len(y):,} held-out images, {run.norm} {eps}", png=run.paths.curve_png, svg=run.paths.curve_svg,
    )  # fmt: skip
    return _write(
        run, "sweep-alpha", resolved, sources, inputs, [run.paths.checkpoint], device, started,
        {
            "alpha": chosen.alpha,
            "rule": chosen.rule,
            "reason": chosen.reason,
            "n_examples": len(y),
            "attacks": list(attacks),
            "estimator": calibrated["results"]["estimator"],
            "curve": [point.to_report(points[0]) for point in points],
        },
    )  # fmt: skip


def evaluate(config: EvaluateConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Base and sparsified model under the same attacks on the same test images, judged afresh."""
    from .attacks import expand_attacks
    from .eps_sweep import draw_eps_curve, eps_rows, eps_state_folder, eps_table, evaluate_each_eps, headline_eps
    from .evaluate import EvaluateSettings, evaluate_robustness
    from .evaluation_table import evaluation_table, progress_table
    from .published import published_note, published_results

    run, started = _located(config), time.monotonic()
    alpha, upstream = _alpha_in_use(run, config.alpha)
    eps = _eps(run, config)
    attacks = tuple(expand_attacks(config.attack))
    indices, x, y = _examples(run, config, "test", config.n_examples)
    statistics = sha256_of(run.paths.statistics)
    weights = read_report(run.paths.report("fetch"), "fetch", mend=run.command("fetch"))["results"]["sha256"]
    inputs = {
        f"{upstream}.yaml": sha256_of(run.paths.report(upstream)),
        "images": _images_id(run, config, "test", len(y)),
    }
    resolved = config.model_copy(update={"eps": eps, "norm": run.norm, "alpha": alpha, "n_examples": len(y)})
    if done := _finished("evaluate", run, resolved, inputs, fresh):
        return done

    device = pick_device(config.device)
    checkpoint = load_checkpoint(run.paths.statistics)
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
    console.print(evaluation_table(evaluation, title=f"{run.source.name}, alpha {alpha:g}, {len(y):,} test images, {run.norm} {eps}"))  # fmt: skip
    published = published_results(run.source)
    if line := published_note(published):
        note(line)
    evaluation.save_outcomes(run.paths.outcomes)
    results = (
        evaluation.to_report()
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
    return _write(run, "evaluate", resolved, sources, inputs, [run.paths.outcomes], device, started, results)


def load_sparsified(run: str | Path, *, alpha: float | None = None, device: str = "cpu") -> SparsifiedModel:
    """The sparsified model of a finished sweep, ready to use: an ``nn.Module`` in eval mode, images in, logits out.

    ``run`` is the run folder. ``alpha`` overrides the chosen one; 0 is bit-identical to the base model.
    """
    located = locate_run(ModelConfig(run=Path(run)))
    _, stage = _alpha_in_use(located, None)
    checkpoint = load_checkpoint(located.paths.checkpoint if stage == "sweep-alpha" else located.paths.statistics)
    base = _load_base(located, ModelConfig(run=Path(run)), device, checkpoint.rule)
    return sparsify(base, checkpoint, alpha=alpha)


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


def _ensure_fetched(config: CalibrateConfig, sources: dict[str, str]) -> Run:
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
    from .published_checkpoint import published_models_of
    from .site_rules import among_published
    from .sites import find_sites

    if among_published(config.sites) is None:
        return find_sites(model, images)
    known = published_models_of(run.source.entry) if run.source.kind == "zoo" else []
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
