"""``meansparse train``: adversarial training of the ResNet-18 that the embedded models and the ablations use.

PGD adversarial training (Madry et al. 2018; paper, section A.1): each batch is replaced by the images a PGD attack makes
of it. Data order, augmentation and random starts are functions of (seed, epoch, batch), so a run that was killed goes on
from its last finished epoch and ends in the same weights.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .artifacts import load_torch, save_torch
from .errors import ArtifactError
from .networks import ResNet18


@dataclass(frozen=True)
class TrainSettings:
    """What the weights depend on; a resumed run must agree in all of them."""

    width: int = 64
    activation: str = "gelu"
    eps: float = 8 / 255
    n_steps: int = 10
    """Attack steps; 0 is standard training."""
    step_size: float = 0.0078
    n_epochs: int = 200
    batch_size: int = 256
    schedule: str = "steps"
    """"steps": divided by 10 at half and three quarters; "one-cycle": up over 30 %, then down to zero (cosine)."""
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_padding: int = 4
    flip: bool = True
    seed: int = 0


@dataclass(frozen=True)
class EpochResult:
    """One line of the training log; accuracies are fractions."""

    epoch: int
    train_loss: float
    held_out_accuracy: float
    held_out_robust_accuracy: float
    seconds: float


def learning_rate(settings: TrainSettings, progress: float) -> float:
    """Learning rate at ``progress`` in [0, 1) of the whole run."""
    if settings.schedule == "steps":
        return settings.lr * (0.1 if progress >= 0.5 else 1.0) * (0.1 if progress >= 0.75 else 1.0)
    if progress < 0.3:
        return settings.lr * (0.04 + 0.96 * progress / 0.3)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7))


def pgd_linf(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, step_size: float, n_steps: int, generator: torch.Generator
) -> Tensor:
    """PGD on cross-entropy from a uniform random start (Madry et al. 2018); the last iterate, inside [0, 1]."""
    noise = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
    adv = (x + eps * noise).clamp(0, 1)
    for _ in range(n_steps):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        adv = adv.detach() + step_size * grad.sign()
        adv = torch.minimum(torch.maximum(adv, x - eps), x + eps).clamp(0, 1)
    return adv.detach()


def augment(x: Tensor, *, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop after zero padding, and random horizontal flip, drawn for each image."""
    n, _, height, width = x.shape
    if flip:
        flipped = torch.rand(n, generator=generator) < 0.5
        x = torch.where(flipped.view(-1, 1, 1, 1), x.flip(3), x)
    if padding:
        offsets = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
        padded = F.pad(x, (padding,) * 4)
        rows = (offsets[0] + torch.arange(height))[:, None, :, None]
        columns = (offsets[1] + torch.arange(width))[:, None, None, :]
        images = torch.arange(n)[:, None, None, None]
        x = padded[images, torch.arange(x.shape[1])[None, :, None, None], rows, columns]
    return x


def train_model(
    settings: TrainSettings,
    train_set: tuple[Tensor, Tensor],
    held_out_set: tuple[Tensor, Tensor],
    *,
    n_classes: int,
    folder: Path,
    device: str = "cpu",
    on_batch: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
) -> tuple[ResNet18, list[EpochResult]]:
    """Train to the end, or go on where ``folder`` stopped, and return the best epoch's network and the log.

    ``train_set`` and ``held_out_set`` are uint8 images (n, channels, height, width) and labels (n,). The best epoch is
    the one of highest PGD accuracy on the held-out images, never on the test set.
    """
    torch.manual_seed(settings.seed)
    images, labels = train_set
    # Channels-last is faster, but torch 2.15 on a CPU corrupts memory in the backward pass at widths such as 6.
    layout = torch.channels_last if settings.width % 8 == 0 else torch.contiguous_format
    model = ResNet18(
        n_classes=n_classes, width=settings.width, activation=settings.activation, in_channels=images.shape[1]
    ).to(memory_format=layout)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    log: list[EpochResult] = []
    best = model.state_dict()
    state_file = folder / "train-state.pt"
    if state_file.exists():
        state = load_torch(state_file)
        if state["settings"] != asdict(settings):
            was = state["settings"]
            changed = ", ".join(f"{k}: {was.get(k)} -> {v}" for k, v in asdict(settings).items() if was.get(k) != v)
            raise ArtifactError(
                f"{state_file} was begun with other settings ({changed})", hint="use another --run, or delete that file"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log, best = [EpochResult(**row) for row in state["log"]], state["best"]

    n_batches = math.ceil(len(labels) / settings.batch_size)
    for epoch in range(len(log), settings.n_epochs):
        started, total_loss = time.monotonic(), 0.0
        generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
        order = torch.randperm(len(labels), generator=generator)
        for batch, chosen in enumerate(_chunks(order, settings.batch_size)):
            lr = learning_rate(settings, (epoch + batch / n_batches) / settings.n_epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x = augment(
                images[chosen].float() / 255, padding=settings.crop_padding, flip=settings.flip, generator=generator
            ).to(device, memory_format=layout)
            y = labels[chosen].to(device)
            if settings.n_steps:
                model.eval()  # the attack must not move the batch-norm averages
                x = pgd_linf(
                    model, x, y, eps=settings.eps, step_size=settings.step_size, n_steps=settings.n_steps,
                    generator=generator,
                )  # fmt: skip
            model.train()
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total_loss += loss.item() * len(y)
            if on_batch is not None:
                on_batch(epoch, batch, loss.item())
        model.eval()
        clean, robust = pgd_accuracy(model, *held_out_set, eps=settings.eps, n_steps=10, device=device)
        result = EpochResult(epoch, total_loss / len(labels), clean, robust, round(time.monotonic() - started, 1))
        if all(robust >= earlier.held_out_robust_accuracy for earlier in log):
            best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        log.append(result)
        save_torch(
            state_file,
            {
                "settings": asdict(settings),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "log": [asdict(row) for row in log],
                "best": best,
            },
        )
        if on_epoch is not None:
            on_epoch(result)
    model.load_state_dict(best)
    return model.eval(), log


def pgd_accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, n_steps: int, device: str, batch_size: int = 250
) -> tuple[float, float]:
    """Clean and PGD accuracy (step eps / 4) of uint8 images; the random starts depend on the position alone."""
    clean = robust = 0
    for start in range(0, len(labels), batch_size):
        x = (images[start : start + batch_size].float() / 255).to(device)
        y = labels[start : start + batch_size].to(device)
        with torch.no_grad():
            clean += int((model(x).argmax(1) == y).sum())
        generator = torch.Generator().manual_seed(start)
        adv = pgd_linf(model, x, y, eps=eps, step_size=eps / 4, n_steps=n_steps, generator=generator)
        with torch.no_grad():
            robust += int((model(adv).argmax(1) == y).sum())
    return clean / len(labels), robust / len(labels)


def _chunks(order: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
