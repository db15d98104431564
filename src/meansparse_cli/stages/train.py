"""What ``meansparse train`` does around ``train_model``: images in, a table while it runs, weights and report out."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..data.datasets import KNOWN_DATASETS, content_id, load_split, take_examples
from ..errors import ArtifactError, ConfigError, DataError
from ..files import save_tensors, sha256_of
from ..operator.checkpoint import save_checkpoint
from ..operator.sparsify import straight_through
from ..reporting.console import LiveView, console, live, note
from ..reporting.progress import show_epochs
from ..reporting.training_curve import draw_training_curve
from ..runs.model import pick_device
from ..runs.report import read_report, verify_outputs, write_report
from ..settings.training import TrainConfig
from ..settings.values import check_eps, eps_value
from ..stats.format import percent
from ..stats.paired import Accuracy, accuracy_of
from ..training.attack import pgd_outcomes
from ..training.images import read_pixels
from ..training.operators import ramp_epochs, take_operators
from ..training.state import EpochResult, best_epoch, result_settings
from ..training.train import STATE_FILE, channels_last, train_model

Split = Subset[tuple[Tensor, int]]
TEST_STEPS = 20
N_SELECTION = 1000
_LABELS = {
    "test_accuracy": "test clean",
    f"test_pgd{TEST_STEPS}_accuracy": f"PGD-{TEST_STEPS}",
    f"test_pgd{TEST_STEPS}_straight_through_accuracy": f"PGD-{TEST_STEPS} straight through the operator",
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},  # the defaults are the paper's, but for beta
    "short": {"epochs": 30, "schedule": "one-cycle", "lr": 0.2},
}


def with_preset(config: TrainConfig, sources: dict[str, str]) -> TrainConfig:
    """``config`` with its preset's values wherever neither a flag nor a file gave one; ``sources`` is kept in step."""
    update = {key: value for key, value in PRESETS[config.preset].items() if sources[key] == "default"}
    sources |= dict.fromkeys(update, f"preset {config.preset}")
    return config.model_copy(update=update)


def train_folder(config: TrainConfig) -> Path:
    """The run folder: ``--run``, or one named after what is trained."""
    name = f"train-{Path(config.dataset).stem}-{config.method}-{config.activation}-w{config.width}"
    return config.run or Path("runs") / name


def train(config: TrainConfig, sources: dict[str, str], *, fresh: bool = False) -> Path | None:
    """Train, measure clean and PGD-20 accuracy on test images, write ``model.safetensors``, curve and ``train.yaml``.

    Returns the report's path, or None where the time limit came first: the same call then goes on. ``--model`` of every
    other command takes ``model.safetensors``.
    """
    config = _with_eps(with_preset(config, sources))
    folder, device, started = train_folder(config), pick_device(config.device), time.monotonic()
    _check(config, device, fresh=fresh)
    train_split, selection, test_split = _splits(config)
    config = config.model_copy(update={"held_out_examples": len(selection)})
    if config.n_examples is not None:
        train_split = take_examples(train_split, config.n_examples)
    _check_sizes(config, len(train_split), len(selection))
    images = content_id(train_split)
    if fresh:
        for name in (STATE_FILE, "train.yaml", "model.safetensors"):  # the last one would pass for what is trained now
            (folder / name).unlink(missing_ok=True)
    elif (done := _done_before(config, folder, images)) is not None:
        note(f"train: done before, {done}")
        return done
    selected_on = "test" if config.paper_selection else "held-out"
    note(
        f"train: {_title(config)}, {len(train_split):,} images, {config.epochs} epochs on {device}; "
        f"saved in {folder} after each, and taken up there by the same command"
    )
    if config.paper_selection:
        note(
            "train: as in the paper the best epoch is chosen on test images, so that its accuracy on them is too good, and the "
            "held-out images are trained on: choose no alpha on them"
        )
    n_classes: int = train_split.dataset.n_classes  # type: ignore[attr-defined]
    with live("images") as view:
        view.begin("reading", len(train_split) + len(selection))
        train_set = read_pixels(train_split, config.workers, view.advance)
        selection_set = read_pixels(selection, config.workers, view.advance)
        model, log = train_model(
            config, train_set, selection_set, n_classes=n_classes, folder=folder, device=device, images_id=images,
            deadline=None if config.time_limit is None else started + 60 * config.time_limit,
            on_batch=_bar(view, config, len(train_set[1])), on_epoch=_table(view, config, selected_on),
        )  # fmt: skip
        if len(log) < config.epochs:
            note(
                f"train: stopped at the time limit after epoch {len(log)} of {config.epochs}; the same command goes on"
            )
            return None
        model.to(getattr(torch, config.save_dtype)).float()  # measured as they are saved
        test = take_examples(test_split, min(config.test_examples, len(test_split)))
        view.begin("testing", len(test))
        test_set = read_pixels(test, config.workers)
        measured = _measure(model, test_set, config, device)
        if config.mean_sparse_alpha is not None:
            with straight_through(model):
                through = _measure(model, test_set, config, device)
            measured[f"test_pgd{TEST_STEPS}_straight_through_accuracy"] = through[f"test_pgd{TEST_STEPS}_accuracy"]
    best = best_epoch(log, config).epoch
    results = {
        "network": {"n_classes": n_classes, "width": config.width, "activation": config.activation, "in_channels": train_set[0].shape[3]},
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_train_examples": len(train_set[1]),
        "selected_on": selected_on,
        "best_epoch": best,
        **{key: asdict(value) for key, value in measured.items()},
        "epochs": [asdict(row) for row in log],
    }  # fmt: skip
    weights, written = folder / "model.safetensors", []
    if config.mean_sparse_alpha is not None:
        image_shape = (train_set[0].shape[3], *train_set[0].shape[1:3])
        model, operators = take_operators(model, image_shape)
        save_checkpoint(folder / "meansparse.safetensors", operators)
        written.append(folder / "meansparse.safetensors")
    _write_weights(weights, model, config, results)
    png, svg = folder / "train.png", folder / "train.svg"
    draw_training_curve(log, best=best, selected_on=selected_on, title=_title(config), png=png, svg=svg)
    report = folder / "train.yaml"
    write_report(
        report, stage="train",
        config={key: {"value": value, "source": sources[key]} for key, value in config.model_dump(mode="json").items() if key != "run"},
        inputs={"images": images}, outputs={path.name: sha256_of(path) for path in (weights, *written, png, svg)},
        results=results, device=device, seconds=time.monotonic() - started,
    )  # fmt: skip
    accuracies = ", ".join(f"{_LABELS[key]} {percent(a.fraction, a.standard_error)} %" for key, a in measured.items())
    note(f"train: {accuracies} ({len(test):,} images), weights of epoch {best + 1} of {config.epochs}")
    if shortcuts := _shorter_than_the_papers(config):
        note(f"train: {shortcuts}: expect less than after the paper's training")
    note(f"train: weights in {weights}")
    return report


def _splits(config: TrainConfig) -> tuple[Split, Split, Split]:
    """Training images, those that choose the best epoch, and test images."""
    calibration, held_out, test = (
        load_split(config.dataset, config.data_dir, name) for name in ("calibration", "held-out", "test")
    )
    if config.paper_selection:  # nothing is held out
        whole = Subset(calibration.dataset, sorted([*calibration.indices, *held_out.indices]))
        return whole, take_examples(test, min(config.held_out_examples or len(test), len(test))), test
    n = min(config.held_out_examples or N_SELECTION, len(held_out))
    return calibration, take_examples(held_out, n), test


def _shorter_than_the_papers(config: TrainConfig) -> str:
    """What of a run's length falls short of the paper's, in words; "" where nothing does."""
    paper = TrainConfig()
    parts = [f"{config.epochs} epochs, not {paper.epochs}"] if config.epochs < paper.epochs else []
    if config.n_examples is not None:
        parts.append(f"{config.n_examples:,} images")
    if config.method != "standard" and config.n_steps < paper.n_steps:
        parts.append(f"{config.n_steps} attack steps, not {paper.n_steps}")
    return ", ".join(parts)


def _with_eps(config: TrainConfig) -> TrainConfig:
    facts = KNOWN_DATASETS.get(config.dataset)
    eps = config.eps or (facts.eps["Linf"] if facts else "8/255")
    check_eps(eps, "Linf")
    return config.model_copy(update={"eps": eps})


def _measure(
    model: torch.nn.Module, test_set: tuple[Tensor, Tensor], config: TrainConfig, device: str
) -> dict[str, Accuracy]:
    assert config.eps is not None
    clean, robust = pgd_outcomes(
        model,
        *test_set,
        eps=eps_value(config.eps),
        n_steps=TEST_STEPS,
        device=device,
        channels_last=channels_last(config),
    )
    return {"test_accuracy": accuracy_of(clean), f"test_pgd{TEST_STEPS}_accuracy": accuracy_of(robust)}


def _check(config: TrainConfig, device: str, *, fresh: bool) -> None:
    """What no single setting can tell, before an image is read."""
    if fresh and config.time_limit is not None:
        raise ConfigError(
            "--fresh with --time-limit: the same command, queued again, would begin anew each time",
            hint="remove the run folder once, and leave --fresh out",
        )
    if config.cuda_graphs and torch.device(device).type != "cuda":
        raise ConfigError(f"--cuda-graphs on {device}", hint="leave it out, or --device cuda")
    if config.mean_sparse_ramp is not None and config.mean_sparse_alpha is None:
        raise ConfigError("--mean-sparse-ramp without --mean-sparse-alpha", hint="--mean-sparse-alpha 0.2, say")
    ramp_epochs(config)


def _check_sizes(config: TrainConfig, n_train: int, n_selection: int) -> None:
    """Batch normalisation has no variance in a batch of one image, and no epoch is best without an image to choose by."""
    if min(config.batch_size, n_train) < 2:
        raise ConfigError(
            f"a batch is of {config.batch_size} images out of {n_train}: batch normalisation needs two at least",
            hint="raise --batch-size" if n_train > 1 else "raise --n-examples",
        )
    if not n_selection:
        raise DataError(
            f"{config.dataset} has so few training images that none is held out to choose the best epoch by",
            hint="give it 10 at least, or choose on test images: --paper-selection",
        )


def _done_before(config: TrainConfig, folder: Path, images: str) -> Path | None:
    """The report of a finished run of the same settings on the same ``images``. Raises ArtifactError for other settings or changed files."""
    path = folder / "train.yaml"
    if not path.exists():
        return None
    mend = "the same command, with"
    report = read_report(path, "train", mend=mend)
    was = {key: entry["value"] for key, entry in report["config"].items()}
    now = result_settings(config) | {key: getattr(config, key) for key in ("test_examples", "save_dtype")}
    changed = ", ".join(f"{k}: {was.get(k)} -> {v}" for k, v in now.items() if was.get(k) != v)
    if not changed and report["inputs"]["images"] != images:
        changed = "its training images"
    if changed:
        raise ArtifactError(f"{folder} is a run of other settings ({changed})", hint="use another --run, or --fresh")
    verify_outputs(report, folder, mend=mend)
    return path


def _bar(view: LiveView, config: TrainConfig, n_images: int) -> Any:
    def on_batch(epoch: int, batch: int, n: int) -> None:
        if batch == 0:
            view.begin(f"epoch {epoch + 1} of {config.epochs}", n_images - n_images % n)
        view.advance(n)

    return on_batch


def _table(view: LiveView, config: TrainConfig, selected_on: str) -> Any:
    def on_epoch(log: list[EpochResult]) -> None:
        view.show(show_epochs(log, best_epoch(log, config).epoch, selected_on))
        if not console.is_terminal:
            row = log[-1]
            note(f"epoch {row.epoch + 1} of {config.epochs}: loss {row.train_loss:.3f}, {selected_on} clean {percent(row.selection_accuracy)} %, PGD-10 {percent(row.selection_robust_accuracy)} %, {row.seconds:.1f} s")  # fmt: skip

    return on_epoch


def _title(config: TrainConfig) -> str:
    return f"{Path(config.dataset).stem}, ResNet-18 of width {config.width}, {config.activation}, {config.method}"


def _write_weights(path: Path, model: torch.nn.Module, config: TrainConfig, results: dict[str, Any]) -> None:
    dtype = getattr(torch, config.save_dtype)
    state: dict[str, Tensor] = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    measured = {key: results[key] for key in results if key.startswith("test_") or key == "selected_on"}
    header = {
        "network": json.dumps(results["network"]),
        "dataset": config.dataset,
        "training": json.dumps(result_settings(config) | measured),
    }
    save_tensors(path, state, header)
