"""What of a training run is a function of settings and position: learning rate, seeds, average of the weights."""

import hashlib
import math

import torch
from torch import Tensor


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


class WeightAverage:
    """Exponential average of parameters and batch-norm averages, a step at a time: w <- d w + (1 - d) new.

    d rises to ``decay`` as (1 + step) / (10 + step), so that a short run is not dominated by its random start. Integer
    buffers are copied. ``state`` has the keys of the model's ``state_dict``.
    """

    def __init__(self, state: dict[str, Tensor], decay: float) -> None:
        self.state = {key: value.detach().clone() for key, value in state.items()}
        self.decay, self.step = decay, 0

    def update(self, state: dict[str, Tensor]) -> None:
        """Move towards ``state``."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        with torch.no_grad():
            floating = [key for key, value in state.items() if value.is_floating_point()]
            torch._foreach_lerp_([self.state[k] for k in floating], [state[k].detach() for k in floating], 1 - decay)
            for key in state.keys() - set(floating):
                self.state[key].copy_(state[key])
