"""What ``meansparse train`` does around ``train_model``: images in, a table while it runs, weights and report out."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from .artifacts import sha256_of, write_bytes
from .config import check_eps, eps_value, parse_eps
from .console import console, live, note, percent
from .data import KNOWN_DATASETS, content_id, load_split, take_examples
from .errors import ConfigError
from .networks import ACTIVATIONS
from .pipeline import pick_device
from .report import write_report
from .train import EpochResult, TrainSettings, pgd_accuracy, train_model

SELECTION_EXAMPLES = 1000
TEST_EXAMPLES, TEST_STEPS = 1000, 20


def train_command(
    *, dataset: str, data_dir: Path | None, run: Path | None, width: int, activation: str, eps: str | None, n_steps: int,
    step_size: str, epochs: int, batch_size: int, schedule: str, lr: float, crop_padding: int, flip: bool, device: str,
    seed: int,
) -> Path:  # fmt: skip
    """Train, measure clean and PGD-20 accuracy on up to 1,000 test images, write ``model.safetensors`` and ``train.yaml``.

    Returns the path of the weights, which ``--weights`` of every other command takes.
    """
    from safetensors.torch import save

    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation is {activation!r}", hint=f"one of {', '.join(ACTIVATIONS)}")
    if schedule not in ("steps", "one-cycle"):
        raise ConfigError(f"schedule is {schedule!r}", hint="steps or one-cycle")
    for name, value in (("width", width), ("epochs", epochs), ("batch-size", batch_size)):
        if value < 1:
            raise ConfigError(f"--{name} is {value}; expected 1 or more")
    facts = KNOWN_DATASETS.get(dataset)
    budget = eps or (facts.eps["Linf"] if facts else "8/255")
    try:
        parse_eps(budget), parse_eps(step_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_eps(budget, "Linf")
    settings = TrainSettings(
        width=width, activation=activation, eps=eps_value(budget), n_steps=n_steps, step_size=eps_value(step_size),
        n_epochs=epochs, batch_size=batch_size, schedule=schedule, lr=lr, crop_padding=crop_padding, flip=flip, seed=seed,
    )  # fmt: skip
    folder = run or Path("runs") / f"train-{Path(dataset).stem}-w{width}"
    chosen_device, started = pick_device(device), time.monotonic()
    calibration = load_split(dataset, data_dir, "calibration")
    held_out = load_split(dataset, data_dir, "held-out")
    held_out = take_examples(held_out, min(SELECTION_EXAMPLES, len(held_out)))
    n_classes: int = calibration.dataset.n_classes  # type: ignore[attr-defined]
    with live("images") as view:
        train_set, selection_set = _as_bytes(calibration, view), _as_bytes(held_out, view)
        log: list[EpochResult] = []
        n_images = len(train_set[1])

        def on_batch(epoch: int, batch: int, loss: float) -> None:
            if batch == 0:
                view.begin(f"epoch {epoch + 1} of {epochs}", n_images)
            view.advance(min(batch_size, n_images - batch * batch_size))

        def on_epoch(result: EpochResult) -> None:
            log.append(result)
            view.show(_log_table(log))
            if not console.is_terminal:
                note(f"epoch {result.epoch + 1}: held-out clean {percent(result.held_out_accuracy)} %, PGD-10 {percent(result.held_out_robust_accuracy)} %")  # fmt: skip

        model, rows = train_model(
            settings, train_set, selection_set, n_classes=n_classes, folder=folder, device=chosen_device,
            on_batch=on_batch, on_epoch=on_epoch,
        )  # fmt: skip
        test = load_split(dataset, data_dir, "test")
        test_set = _as_bytes(take_examples(test, min(TEST_EXAMPLES, len(test))), view)
    clean, robust = pgd_accuracy(model, *test_set, eps=settings.eps, n_steps=TEST_STEPS, device=chosen_device)
    network = {"n_classes": n_classes, "width": width, "activation": activation, "in_channels": train_set[0].shape[1]}
    weights = folder / "model.safetensors"
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(weights, save(state, {"network": json.dumps(network), "dataset": dataset}))
    report: dict[str, Any] = {
        "network": network,
        "best_epoch": max(rows, key=lambda r: (r.held_out_robust_accuracy, r.epoch)).epoch,
        "n_test_examples": len(test_set[1]),
        "test_accuracy": clean,
        "test_pgd20_accuracy": robust,
        "epochs": [asdict(row) for row in rows],
    }
    write_report(
        folder / "train.yaml", stage="train", config={"settings": asdict(settings) | {"dataset": dataset, "eps": budget}},
        inputs={"images": content_id(calibration)}, outputs={weights.name: sha256_of(weights)}, results=report,
        device=chosen_device, seconds=time.monotonic() - started,
    )  # fmt: skip
    note(f"train: test clean {percent(clean)} %, PGD-{TEST_STEPS} {percent(robust)} % ({len(test_set[1]):,} images)")
    return weights


def _as_bytes(images: Any, view: Any) -> tuple[Tensor, Tensor]:
    """All images of a split as uint8 (n, channels, height, width), decoded once."""
    view.begin("reading", len(images))
    pixels, labels = [], []
    for i in range(len(images)):
        x, y = images[i]
        pixels.append((x * 255).round().to(torch.uint8))
        labels.append(y)
        view.advance(1)
    return torch.stack(pixels), torch.tensor(labels)


def _log_table(log: list[EpochResult]) -> Table:
    table = Table(
        "epoch", "loss", "held-out clean %", "held-out PGD-10 %", "seconds", title="training", title_justify="left"
    )
    for row in log[-12:]:
        table.add_row(str(row.epoch + 1), f"{row.train_loss:.3f}", percent(row.held_out_accuracy), percent(row.held_out_robust_accuracy), f"{row.seconds:.0f}")  # fmt: skip
    return table
