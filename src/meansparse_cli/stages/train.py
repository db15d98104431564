"""What ``meansparse train`` does around ``train_model``: images in, a table while it runs, weights and report out."""

import copy
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.identity import content_id
from ..data.splits import Split, take_examples
from ..errors import ArtifactError
from ..files import save_tensors, sha256_of
from ..ledger import changes
from ..models.networks import ResNet18
from ..operator.active import backward_rule
from ..operator.checkpoint import save_checkpoint
from ..reporting.console import LiveView, console, live, note, phase
from ..reporting.curves import draw_training_curve
from ..reporting.model_tables import show_epochs
from ..runs.device import pick_device
from ..runs.report import read_report, verify_outputs, write_report
from ..settings.training import TrainConfig
from ..settings.values import eps_value
from ..stats.format import percent
from ..stats.paired import Accuracy, accuracy_of
from ..training.attack import pgd_outcomes
from ..training.images import Pixels, TrainingData, read_pixels
from ..training.operators import take_operators
from ..training.plan import check_settings, check_sizes, shorter_than_the_papers, splits_of, with_eps, with_preset
from ..training.ranks import rank_and_world, wait_for_all
from ..training.state import EpochResult, best_epoch, result_settings
from ..training.train import STATE_FILE, channels_last, time_training, train_model
from .plan import tell

WEIGHTS, REPORT = "model.safetensors", "train.yaml"
TEST_STEPS = 20
_LABELS = {  # of what is measured: clean, PGD, PGD straight through
    "test_accuracy": "test clean",
    f"test_pgd{TEST_STEPS}_accuracy": f"PGD-{TEST_STEPS}",
    f"test_pgd{TEST_STEPS}_straight_through_accuracy": f"PGD-{TEST_STEPS} straight through the operator",
}


def train_folder(config: TrainConfig) -> Path:
    """The run folder: ``--run``, or one named after what is trained."""
    name = f"train-{Path(config.dataset).stem}-{config.method}-{config.activation}-w{config.width}"
    return config.run or Path("runs") / name


@dataclass(frozen=True)
class _Asked:
    """A training with every default filled in, and its images; ``images_id`` tells the training images from others."""

    config: TrainConfig
    sources: dict[str, str]
    folder: Path
    device: str
    images: Split
    selection: Split
    test: Split
    images_id: str

    @property
    def selected_on(self) -> str:
        return "test" if self.config.paper_selection else "held-out"

    @property
    def title(self) -> str:
        config = self.config
        return f"{Path(config.dataset).stem}, ResNet-18 of width {config.width}, {config.activation}, {config.method}"


@dataclass(frozen=True)
class _Trained:
    """The best epoch's network, the log, and what was measured on ``n_test`` test images."""

    model: ResNet18
    log: list[EpochResult]
    measured: dict[str, Accuracy]
    n_test: int


def train(config: TrainConfig, sources: dict[str, str], *, fresh: bool = False) -> Path | None:
    """``model.safetensors``, curve and ``train.yaml``, whose path it returns; None after a plan or at the limit."""
    started = time.monotonic()
    asked = _asked(with_eps(with_preset(config, sources)), sources, fresh=fresh)
    if fresh:
        for name in (STATE_FILE, REPORT, WEIGHTS) if rank_and_world()[0] == 0 else ():
            (asked.folder / name).unlink(missing_ok=True)  # the last one would pass for what is trained now
        wait_for_all()
    elif (done := _done_before(asked)) is not None:
        note(f"train: done before, {done}")
        return done
    if asked.config.plan:
        _plan(asked)
        return None
    _announce(asked)
    trained = _train(asked, started)
    return None if trained is None else _write(asked, trained, started)


def _asked(config: TrainConfig, sources: dict[str, str], *, fresh: bool) -> _Asked:
    device = pick_device(config.device)
    check_settings(config, device, fresh=fresh)
    images, selection, test = splits_of(config)
    config = config.model_copy(update={"held_out_examples": len(selection)})
    if config.n_examples is not None:
        images = take_examples(images, config.n_examples)
    check_sizes(config, len(images), len(selection), rank_and_world()[1])
    return _Asked(config, sources, train_folder(config), device, images, selection, test, content_id(images))


def _plan(asked: _Asked) -> None:
    """Of every step and every choice of the best epoch, from a few of each."""
    config, size = asked.config, min(asked.config.batch_size, len(asked.images))
    few = [take_examples(part, min(n, len(part))) for part, n in ((asked.images, 2 * size), (asked.selection, size))]
    data = TrainingData(*map(read_pixels, few), asked.images.dataset.n_classes, asked.images_id)  # type: ignore
    with phase("timing"):
        step, choice, n_done = time_training(config, data, asked.folder, device=asked.device)
    seconds = config.epochs * (len(asked.images) // size * step + len(asked.selection) * choice)
    what = f"{len(asked.images):,} images x {config.epochs} epochs"
    tell("train", asked.device, what, seconds=seconds, done=n_done / config.epochs)


def _announce(asked: _Asked) -> None:
    note(
        f"train: {asked.title}, {len(asked.images):,} images, {asked.config.epochs} epochs on {asked.device}; "
        f"saved in {asked.folder} after each, and taken up there by the same command"
    )
    if asked.config.paper_selection:
        note(
            "train: as in the paper the best epoch is chosen on test images, so that its accuracy on them is too good, "
            "and the held-out images are trained on: choose no alpha on them"
        )


def _train(asked: _Asked, started: float) -> _Trained | None:
    """The network, trained and measured; None where the time limit came first."""
    config, limit = asked.config, asked.config.time_limit
    with live("images") as view:
        view.begin("reading", len(asked.images) + len(asked.selection))
        pixels, selection = (
            read_pixels(part, config.workers, view.advance) for part in (asked.images, asked.selection)
        )
        n_classes: int = asked.images.dataset.n_classes  # type: ignore[attr-defined]
        model, log = train_model(
            config,
            TrainingData(pixels, selection, n_classes, asked.images_id),
            asked.folder,
            device=asked.device,
            deadline=None if limit is None else started + 60 * limit,
            on_batch=partial(_on_batch, view, asked),
            on_epoch=partial(_on_epoch, view, asked),
        )
        if len(log) < config.epochs:
            note(
                f"train: stopped at the time limit after epoch {len(log)} of {config.epochs}; the same command goes on"
            )
            return None
        if rank_and_world()[0] > 0:
            return None  # the first one measures and writes
        model.to(getattr(torch, config.save_dtype)).float()  # measured as they are saved
        test = take_examples(asked.test, min(config.test_examples, len(asked.test)))
        view.begin("testing", len(test))
        measured = _measure(model, read_pixels(test, config.workers), asked)
    return _Trained(model, log, measured, len(test))


def _measure(model: ResNet18, test: Pixels, asked: _Asked) -> dict[str, Accuracy]:
    """Clean and PGD accuracy; with operators in place, also where the gradient passes straight through them."""
    options: dict[str, Any] = {"eps": eps_value(str(asked.config.eps)), "channels_last": channels_last(asked.config)}
    outcomes = partial(pgd_outcomes, model, *test, n_steps=TEST_STEPS, device=asked.device, **options)
    measured = dict(zip(list(_LABELS)[:2], map(accuracy_of, outcomes()), strict=True))
    if asked.config.mean_sparse_alpha is not None:
        with backward_rule(model, "identity"):
            measured[list(_LABELS)[2]] = accuracy_of(outcomes()[1])
    return measured


def _write(asked: _Asked, trained: _Trained, started: float) -> Path:
    """Weights, operators, curve and, last, the report."""
    config, folder, log, model = asked.config, asked.folder, trained.log, trained.model
    best = best_epoch(log, config).epoch
    results = {
        "network": {
            "n_classes": model.fc.out_features,
            "width": config.width,
            "activation": config.activation,
            "in_channels": model.conv1.in_channels,
        },
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_train_examples": len(asked.images),
        "selected_on": asked.selected_on,
        "best_epoch": best,
        **{key: asdict(value) for key, value in trained.measured.items()},
        "epochs": [asdict(row) for row in log],
    }
    outputs = [folder / WEIGHTS]
    if config.mean_sparse_alpha is not None:
        model, operators = take_operators(model, tuple(asked.images[0][0].shape))
        outputs.append(folder / "meansparse.safetensors")
        save_checkpoint(outputs[-1], operators)
    _write_weights(outputs[0], model, config, results)
    png, svg = folder / "train.png", folder / "train.svg"
    draw_training_curve(log, best=best, selected_on=asked.selected_on, title=asked.title, png=png, svg=svg)
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key != "run"}
    if config.class_order is None:
        del settings["class_order"]  # in no report where it was not given
    write_report(
        folder / REPORT,
        stage="train",
        config={key: {"value": value, "source": asked.sources[key]} for key, value in settings.items()},
        inputs={"images": asked.images_id},
        outputs={path.name: sha256_of(path) for path in (*outputs, png, svg)},
        results=results,
        device=asked.device,
        seconds=time.monotonic() - started,
    )
    _tell(asked, trained, best)
    return folder / REPORT


def _tell(asked: _Asked, trained: _Trained, best: int) -> None:
    accuracies = ", ".join(
        f"{_LABELS[key]} {percent(a.fraction, a.standard_error)} %" for key, a in trained.measured.items()
    )
    note(f"train: {accuracies} ({trained.n_test:,} images), weights of epoch {best + 1} of {asked.config.epochs}")
    if shortcuts := shorter_than_the_papers(asked.config):
        note(f"train: {shortcuts}: expect less than after the paper's training")
    note(f"train: weights in {asked.folder / WEIGHTS}")


def _done_before(asked: _Asked) -> Path | None:
    """The report of a finished run of the same. Raises ArtifactError for other settings or images, or changed files."""
    path, config = asked.folder / REPORT, asked.config
    if not path.exists():
        return None
    mend = "the same command, with"
    report = read_report(path, "train", mend=mend)
    now = result_settings(config) | {key: getattr(config, key) for key in ("test_examples", "save_dtype")}
    was = {key: entry["value"] for key, entry in report["config"].items() if key in now}
    differing = ", ".join(changes(was, now))
    if not differing and report["inputs"]["images"] != asked.images_id:
        differing = "its training images"
    if differing:
        raise ArtifactError(
            f"{asked.folder} is a run of other settings ({differing})", hint="use another --run, or --fresh"
        )
    verify_outputs(report, asked.folder, mend=mend)
    return path


def _on_batch(view: LiveView, asked: _Asked, epoch: int, batch: int, n: int) -> None:
    if batch == 0:
        epochs = asked.config.epochs
        n_images = len(asked.images) - len(asked.images) % n
        view.begin(f"epoch {epoch + 1} of {epochs}", n_images, work=(1.0, epochs - epoch - 1))
    view.advance(n)


def _on_epoch(view: LiveView, asked: _Asked, log: list[EpochResult]) -> None:
    view.show(show_epochs(log, best_epoch(log, asked.config).epoch, asked.selected_on))
    if not console.is_terminal:
        row = log[-1]
        clean, robust = percent(row.selection_accuracy), percent(row.selection_robust_accuracy)
        note(
            f"epoch {row.epoch + 1} of {asked.config.epochs}: loss {row.train_loss:.3f}, "
            f"{asked.selected_on} clean {clean} %, PGD-10 {robust} %, {row.seconds:.1f} s"
        )


def _write_weights(path: Path, model: torch.nn.Module, config: TrainConfig, results: dict[str, Any]) -> None:
    model = copy.deepcopy(model).to(getattr(torch, config.save_dtype))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    measured = {key: results[key] for key in results if key.startswith("test_") or key == "selected_on"}
    header = {
        "network": json.dumps(results["network"]),
        "dataset": config.dataset,
        "training": json.dumps(result_settings(config) | measured),
    }
    save_tensors(path, state, header)
