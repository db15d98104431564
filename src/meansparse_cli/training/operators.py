"""Training with the operator in place: alpha grows by a schedule, the statistics follow an exponential average.

The method's first option, which the paper describes and rejects in favour of post-processing (section 3; version 3
reports runs that were unstable or did not converge). How fast alpha grows and the decay of the averages are not
stated: here alpha rises in equal steps, one an epoch, and a batch counts for a hundredth. The attack of adversarial
training sees the operator as it is, with its zero gradients.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.networks import ResNet18
from ..operator.checkpoint import Checkpoint
from ..operator.insertion import CHILD_NAME, SparsifiedModel, insert, remove
from ..operator.module import MeanSparse
from ..operator.statistics import ChannelStatistics
from ..settings.training import TrainConfig
from ..sites.find import find_sites

SHARE_OF_A_BATCH = 0.01
ESTIMATOR = "moving-average"


class MovingMeanSparse(MeanSparse):
    """The operator, with mean and variance that follow the batches seen in training mode (a plain average at first)."""

    variance: Tensor
    n_batches: Tensor

    def __init__(self, channels: int, channel_axis: int = 1) -> None:
        super().__init__(torch.zeros(channels), torch.ones(channels), channel_axis=channel_axis)
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._follow(x)
        return super().forward(x)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        axes = [axis for axis in range(x.ndim) if axis != self.channel_axis]
        variance, mean = torch.var_mean(x.detach().float(), dim=axes, correction=0)
        self.n_batches += 1
        share = self.n_batches.to(mean.dtype).reciprocal().clamp(min=SHARE_OF_A_BATCH)  # on the device: nobody waits
        self.mean.lerp_(mean, share)
        self.variance.lerp_(variance, share)
        self.std.copy_(self.variance.sqrt())


def take_std_of_variance(model: nn.Module) -> None:
    """Once variances were averaged over ranks."""
    for module in model.modules():
        if isinstance(module, MovingMeanSparse):
            module.std.copy_(module.variance.sqrt())


def ramp_epochs(config: TrainConfig) -> int:
    """How many epochs alpha grows: ``mean_sparse_ramp``, or half of all; 0 without operators."""
    if config.mean_sparse_alpha is None:
        return 0
    ramp = config.mean_sparse_ramp or max(1, config.epochs // 2)
    if ramp > config.epochs:
        raise ConfigError(f"--mean-sparse-ramp is {ramp}, more than the {config.epochs} epochs there are")
    return ramp


def alpha_of_epoch(config: TrainConfig, epoch: int) -> float:
    """alpha in ``epoch`` (from 0): equal steps to ``mean_sparse_alpha`` in the last of ``ramp_epochs``, then that."""
    assert config.mean_sparse_alpha is not None
    return config.mean_sparse_alpha * min(1.0, (epoch + 1) / ramp_epochs(config))


def insert_moving_operators(model: ResNet18, image_shape: tuple[int, ...]) -> None:
    """Put a ``MovingMeanSparse`` in front of every activation of ``model``, in place."""
    sites = find_sites(model, torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)))
    insert(model, sites, [MovingMeanSparse(site.channels, site.channel_axis) for site in sites])


def take_operators(model: ResNet18, image_shape: tuple[int, ...]) -> tuple[ResNet18, Checkpoint]:
    """The network without its operators (a new one), and these, for ``save_checkpoint``; their counts are batches."""
    base = cast(ResNet18, remove(SparsifiedModel(copy.deepcopy(model).cpu(), ())))
    sites = find_sites(base.eval(), torch.rand(2, *image_shape))
    operators = [cast(MovingMeanSparse, model.get_submodule(f"{site.path}.{CHILD_NAME}")) for site in sites]
    statistics = [ChannelStatistics(int(o.n_batches), o.mean.double().cpu(), o.std.double().cpu()) for o in operators]
    return base, Checkpoint(tuple(sites), tuple(statistics), ESTIMATOR, float(operators[0].alpha))
