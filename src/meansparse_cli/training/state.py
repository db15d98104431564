"""What a training run needs to go on after a kill: written whole after every epoch, one file."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..ledger import StateFile
from ..models.networks import ResNet18
from ..settings.training import TrainConfig
from .operators import ramp_epochs
from .ranks import rank_and_world

log = logging.getLogger(__name__)
NOT_IN_RESULT = {"preset", "run", "data_dir", "device", "workers", "time_limit"}  # where
NOT_IN_RESULT |= {"compile", "cuda_graphs", "channels_last", "test_examples", "save_dtype"}  # how
NOT_IN_RESULT |= {"class_order"}  # which tells the images from others
MEND = "use another --run, or --fresh"


@dataclass(frozen=True)
class EpochResult:
    """One line of the training log; accuracies are fractions, on the images that choose the best epoch."""

    epoch: int
    train_loss: float
    selection_accuracy: float
    selection_robust_accuracy: float
    seconds: float


def result_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that the weights depend on; a resumed run must agree in all of them."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_IN_RESULT}


def best_epoch(log: list[EpochResult], config: TrainConfig) -> EpochResult:
    """The last epoch of highest PGD accuracy; for standard training, whose PGD accuracy is near 0, of clean accuracy.

    While alpha grows the last epoch counts as the best: networks of other alphas are not to be compared.
    """
    full = [row for row in log if row.epoch + 1 >= ramp_epochs(config)] or log[-1:]
    if config.method == "standard":
        return max(full, key=lambda row: (row.selection_accuracy, row.epoch))
    return max(full, key=lambda row: (row.selection_robust_accuracy, row.epoch))


class WeightAverage:
    """Exponential average of parameters and batch-norm averages, a step at a time: w <- d w + (1 - d) new.

    d rises to ``decay`` as (1 + step) / (10 + step), so that a short run is not dominated by its random start. Integer
    buffers are copied. ``state`` has the keys of the model's ``state_dict``.
    """

    def __init__(self, state: dict[str, Tensor], decay: float) -> None:
        self.state = {key: value.detach().clone() for key, value in state.items()}
        self.decay, self.step = decay, 0

    def update(self, state: dict[str, Tensor]) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        with torch.no_grad():
            floating = [key for key, value in state.items() if value.is_floating_point()]
            torch._foreach_lerp_([self.state[k] for k in floating], [state[k].detach() for k in floating], 1 - decay)
            for key in state.keys() - set(floating):
                self.state[key].copy_(state[key])


class TrainState:
    """Network, optimiser, average of the weights, log, and the best epoch's weights, kept in step with ``file``."""

    def __init__(
        self,
        file: Path,
        config: TrainConfig,
        model: ResNet18,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        images_id: str,
    ) -> None:
        self.config, self.model, self.optimizer, self.average = config, model, optimizer, average
        self.on_disk = StateFile(file, result_settings(config) | {"images": images_id}, mend=MEND, note=log.warning)
        self.log: list[EpochResult] = []
        self.best: dict[str, Tensor] = {}

    def resume(self) -> None:
        """Take up what an earlier run left. Raises ArtifactError if it had other settings."""
        state = self.on_disk.get()
        if state is None:
            return
        try:
            self.log = [EpochResult(**row) for row in state["log"]]
        except TypeError as error:
            raise ArtifactError(f"{self.on_disk.file} was begun by another version", hint=MEND) from error
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.step = state["average_step"]
            for key, value in self.average.state.items():
                value.copy_(state["average"][key])
        self.best = state["best"]

    def finish(self, result: EpochResult, measured: dict[str, Tensor]) -> None:
        """Add an epoch, keep ``measured`` if it is the best one, and write the file."""
        self.log.append(result)
        if best_epoch(self.log, self.config) is result:
            self.best = {key: value.detach().cpu().clone() for key, value in measured.items()}
        if rank_and_world()[0] > 0:
            return  # the first one writes for all
        self.on_disk.put(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state if self.average is not None else None,
                "average_step": self.average.step if self.average is not None else 0,
                "log": [asdict(row) for row in self.log],
                "best": self.best,
            }
        )
