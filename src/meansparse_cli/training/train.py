"""``meansparse train``: adversarial training of the ResNet-18 that the embedded models and the ablations use.

PGD adversarial training (Madry et al. 2018; paper, section A.1), TRADES (Zhang et al. 2019), standard training. What
is drawn is a function of (seed, epoch, batch), so a run that was killed goes on from its last finished epoch and, on a
CPU, ends in the same weights bit for bit; but not with three ranks or more, which add up gradients in any order. Batch
norm is over the part of a rank, its averages over all of them.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.judge import under_attack
from ..errors import ConfigError
from ..models.networks import ResNet18
from ..operator.active import set_alpha
from ..settings.training import TrainConfig
from ..settings.values import eps_value
from . import ranks
from .attack import Forward, LinfAscent, cross_entropy, divergence, in_precision, pgd_outcomes, uniform_start
from .images import DeviceImages, TrainingData
from .operators import alpha_of_epoch, insert_moving_operators, take_std_of_variance
from .state import EpochResult, TrainState, WeightAverage

OnBatch = Callable[[int, int, int], None]
STATE_FILE = "train-state.pt"
SELECTION_STEPS = 10


@contextmanager
def _sound_weight_gradients(width: int, device: str) -> Iterator[None]:
    """Without oneDNN where its weight gradient writes out of bounds (torch 2.11 to 2.15).

    Seen on one thread, for channels-last 1x1 convolutions of stride 2 and fewer than 8 input channels.
    """
    onednn: Any = torch.backends.mkldnn
    was, is_unsound = onednn.enabled, torch.device(device).type == "cpu" and width < 8
    onednn.enabled = was and not is_unsound
    try:
        yield
    finally:
        onednn.enabled = was


def train_model(
    config: TrainConfig,
    data: TrainingData,
    folder: Path,
    *,
    device: str = "cpu",
    deadline: float | None = None,
    on_batch: OnBatch | None = None,
    on_epoch: Callable[[list[EpochResult]], None] | None = None,
) -> tuple[ResNet18, list[EpochResult]]:
    """Train to the end, or go on where ``folder`` stopped; the best epoch's network in eval mode, and the log.

    ``config.eps`` must be set. The best epoch is the last one of highest PGD accuracy on ``data.selection`` (clean
    accuracy for standard training). ``on_batch`` gets epoch, batch and the number of images, ``on_epoch`` the log. No
    epoch is begun that would probably end after ``deadline`` (``time.monotonic``): the log is then shorter than
    ``config.epochs``.
    """
    training = _Training(config, data, device, on_batch or (lambda epoch, batch, n: None))
    state = TrainState(
        folder / STATE_FILE, config, training.model, training.optimizer, training.average, data.images_id
    )
    for turn in (training.rank == 0, training.rank > 0):  # the first one sets a damaged file aside
        if turn:
            state.resume()
        ranks.wait_for_all()
    ranks.check_all_alike(len(state.log), device)
    for epoch in range(len(state.log), config.epochs):
        late = deadline is not None and bool(state.log) and time.monotonic() + state.log[-1].seconds > deadline
        if ranks.first_decides(late, device):
            break
        started = time.monotonic()
        loss = training.run_epoch(epoch)
        accuracies = training.measure(epoch)
        seconds = round(time.monotonic() - started, 2)
        state.finish(EpochResult(epoch, loss, *accuracies, seconds), training.measured.state_dict())
        if on_epoch is not None:
            on_epoch(state.log)
    training.measured.load_state_dict(state.best)
    return training.measured.eval(), state.log


def time_training(config: TrainConfig, few: TrainingData, folder: Path, *, device: str) -> tuple[float, float, int]:
    """Seconds of a step and of an image that chooses the best epoch, on ``few``; how many epochs ``folder`` holds.

    Nothing is written.
    """
    training = _Training(config, few, device, lambda epoch, batch, n: None)
    state = TrainState(folder / STATE_FILE, config, training.model, training.optimizer, None, few.images_id)
    n_done = len((state.on_disk.get() or {"log": []})["log"])
    times = []
    for _ in range(2):  # the first one compiles and allocates
        times = [time.monotonic()]
        for work in (training.run_epoch, training.measure):
            work(0)
            times.append(time.monotonic())
    n_steps = max(1, len(few.train[0]) // config.batch_size)
    return (times[1] - times[0]) / n_steps, (times[2] - times[1]) / len(few.selection[0]), n_done


class _Training:
    """A network, what moves it, and the copy that is measured: the weights' average, or they themselves."""

    def __init__(self, config: TrainConfig, data: TrainingData, device: str, on_batch: OnBatch) -> None:
        assert config.eps is not None
        self.config, self.data, self.device, self.on_batch = config, data, device, on_batch
        self.channels_last, self.eps = channels_last(config), eps_value(config.eps)
        torch.manual_seed(config.seed)
        if torch.device(device).type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.images = DeviceImages(
            *data.train, device=device, padding=config.crop_padding, flip=config.flip, channels_last=self.channels_last
        )
        self.model = self._network()
        self.optimizer = torch.optim.SGD(_parameter_groups(self.model, config.weight_decay), config.lr, config.momentum)
        self.average = WeightAverage(self.model.state_dict(), config.ema) if config.ema is not None else None
        self.measured = copy.deepcopy(self.model)
        self.loss = _BatchLoss(config, self.model, device, self.eps)
        self.generator = torch.Generator(device)
        self.rank, self.world = ranks.rank_and_world()
        self.place = (self.rank, self.world) if self.world > 1 else ()

    def _network(self) -> ResNet18:
        config, images = self.config, self.images
        model = ResNet18(
            n_classes=self.data.n_classes, width=config.width, activation=config.activation, in_channels=images.channels
        )
        if config.mean_sparse_alpha is not None:
            insert_moving_operators(model, (images.channels, images.height, images.width))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(memory_format=layout).to(self.device)  # type: ignore[call-overload, no-any-return]

    def run_epoch(self, epoch: int) -> float:
        """All images once, in the order of the epoch; the mean loss. Raises ConfigError where training diverged.

        An incomplete last batch is left out (other images each epoch): every batch has one shape.
        """
        config, total_loss = self.config, torch.zeros((), device=self.device)
        batch_size = min(config.batch_size, len(self.images))
        n_batches = len(self.images) // batch_size
        order = epoch_order(len(self.images), config.seed, epoch).to(self.device)
        self.model.train()
        self._set_alpha(self.model, epoch)
        for batch in range(n_batches):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(config.schedule, config.lr, (epoch + batch / n_batches) / config.epochs)
            self.generator.manual_seed(seed_of(config.seed, epoch, batch, *self.place))
            total_loss += self._step(order[batch * batch_size : (batch + 1) * batch_size])
            self.on_batch(epoch, batch, batch_size)
        averages = self.average.state.values() if self.average is not None else ()
        ranks.average_over_ranks([total_loss, *self.model.buffers(), *averages])
        take_std_of_variance(self.model)
        mean_loss = float(total_loss) / n_batches
        if mean_loss != mean_loss or mean_loss == float("inf"):
            raise ConfigError(
                f"the loss is {mean_loss} in epoch {epoch + 1}: training diverged",
                hint="lower --lr, or --precision fp32",
            )
        return mean_loss

    def _step(self, chosen: Tensor) -> Tensor:
        """One step on the images at ``chosen``, of which a rank takes its part; the loss, on the device."""
        x, y = self.images.batch(chosen[self.rank :: self.world], self.generator)
        loss = self.loss(x, y, self.generator) * ranks.weight_of(len(x), len(chosen))
        self.optimizer.zero_grad(set_to_none=True)
        with _sound_weight_gradients(self.config.width, self.device):
            loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model.state_dict())
        return loss.detach()

    def measure(self, epoch: int) -> tuple[float, float]:
        """Clean and PGD accuracy of what this epoch has led to, on the images that choose the best one."""
        self.measured.load_state_dict(self.average.state if self.average is not None else self.model.state_dict())
        self._set_alpha(self.measured, epoch)  # not an average of earlier alphas
        outcomes = pgd_outcomes(
            self.measured,
            *(part[self.rank :: self.world] for part in self.data.selection),
            eps=self.eps,
            n_steps=SELECTION_STEPS,
            device=self.device,
            precision=self.config.precision,
            channels_last=self.channels_last,
        )
        counts = [torch.tensor(float(right.sum()), dtype=torch.float64, device=self.device) for right in outcomes]
        ranks.average_over_ranks(counts)
        clean, robust = (round(float(count) * self.world) / len(self.data.selection[0]) for count in counts)
        return clean, robust

    def _set_alpha(self, model: ResNet18, epoch: int) -> None:
        if self.config.mean_sparse_alpha is not None:
            set_alpha(model, alpha_of_epoch(self.config, epoch))


class _BatchLoss:
    def __init__(self, config: TrainConfig, model: nn.Module, device: str, eps: float) -> None:
        self.config, self.model, self.eps = config, model, eps

        def as_set(network: nn.Module) -> Forward:
            compiled = torch.compile(network, dynamic=False) if config.compile else network
            return in_precision(compiled, device, config.precision)

        learner = ranks.shared(model)
        self.forward = as_set(model)
        self.learning = self.forward if learner is model else as_set(learner)
        self.attack = LinfAscent(
            self.forward,
            divergence if config.method == "trades" else cross_entropy,
            eps=eps,
            step_size=eps_value(config.step_size),
            n_steps=config.n_steps,
            cuda_graph=config.cuda_graphs,
        )

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        if self.config.method == "standard":
            return F.cross_entropy(self.learning(x).float(), y)
        if self.config.method == "pgd":
            with under_attack(self.model):
                adv = self.attack(x, y, uniform_start(x, self.eps, generator))
            return F.cross_entropy(self.learning(adv).float(), y)
        with under_attack(self.model):
            with torch.no_grad():
                target = F.softmax(self.forward(x).float(), 1)
            # TRADES starts beside the image: at the image itself the divergence has no gradient
            noise = torch.empty_like(x).normal_(0, 0.001, generator=generator)
            adv = self.attack(x, target, x + noise)
        logits = self.learning(x).float()
        shift = F.kl_div(
            F.log_softmax(self.learning(adv).float(), 1),
            F.log_softmax(logits, 1),
            log_target=True,
            reduction="batchmean",
        )
        return F.cross_entropy(logits, y) + self.config.beta * shift


def learning_rate(schedule: str, highest: float, progress: float) -> float:
    """Learning rate at ``progress`` in [0, 1) of the whole run.

    ``steps``: divided by 10 at a half and at three quarters (the paper's epochs 100 and 150 of 200). ``one-cycle``:
    from 4 % up to ``highest`` over the first 30 %, then down to zero along a cosine (Smith and Topin 2019).
    """
    if schedule == "steps":
        return highest * (0.1 if progress >= 0.5 else 1.0) * (0.1 if progress >= 0.75 else 1.0)
    if progress < 0.3:
        return highest * (0.04 + 0.96 * progress / 0.3)
    return highest * 0.5 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7))


def seed_of(*position: int) -> int:
    """A seed for (seed, epoch, batch): what is drawn depends on the position alone, so nothing need be remembered."""
    text = "/".join(str(number) for number in position)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of ``n`` images in an epoch, on the CPU, the same for every device."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def channels_last(config: TrainConfig) -> bool:
    """The memory layout: channels-last is faster, but torch 2.15 on a CPU corrupts memory with it at width 6, say."""
    return config.width % 8 == 0 if config.channels_last is None else config.channels_last


def _parameter_groups(model: ResNet18, weight_decay: float) -> list[dict[str, object]]:
    """No decay of an activation's own parameters: it would pull PSiLU towards x / 2, a linear function."""
    shaping = [p for name, p in model.named_parameters() if name.rsplit(".", 2)[-2].startswith("act")]
    ids = {id(p) for p in shaping}
    groups: list[dict[str, object]] = [
        {"params": [p for p in model.parameters() if id(p) not in ids], "weight_decay": weight_decay}
    ]
    return [*groups, {"params": shaping, "weight_decay": 0.0}] if shaping else groups
