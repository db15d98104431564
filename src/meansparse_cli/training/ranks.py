"""The ranks of a training: each takes its part of every batch, and DistributedDataParallel averages the gradients.

Where no process group is there, one process is all of them, and nothing here does anything.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ArtifactError


def rank_and_world() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def shared(model: nn.Module) -> nn.Module:
    """``model``, whose ``backward`` leaves the mean gradient over the ranks; its parameters become those of rank 0."""
    if rank_and_world()[1] == 1:
        return model
    # without broadcasts of batch-norm averages, which TRADES' second forward pass would find changed
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # new in torch 2.15
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, **options)


def weight_of(n: int, n_all: int) -> float:
    """What this rank's mean over ``n`` of ``n_all`` images counts, in a mean over ranks that weighs all alike."""
    return n * rank_and_world()[1] / n_all


def average_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Each becomes its mean over the ranks, in place; integers are left alone."""
    _, world = rank_and_world()
    for tensor in tensors if world > 1 else ():
        if tensor.is_floating_point():
            distributed.all_reduce(tensor)
            tensor /= world


def wait_for_all() -> None:
    """Until every rank has come here."""
    if rank_and_world()[1] > 1:
        distributed.barrier()


def check_all_alike(n_epochs: int, device: str) -> None:
    """Refuse ranks that go on from different epochs: they do not see one folder."""
    if rank_and_world()[1] == 1:
        return
    found = torch.tensor([n_epochs, -n_epochs], device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    if int(found[0]) != -int(found[1]):
        raise ArtifactError(
            f"{-int(found[1])} to {int(found[0])} epochs are done, as the ranks find them",
            hint="all machines have to see one run folder: --run-dir on a shared file system",
        )


def first_decides(flag: bool, device: str) -> bool:
    """What rank 0 says."""
    if rank_and_world()[1] == 1:
        return flag
    said = torch.tensor(flag, device=device, dtype=torch.uint8)
    distributed.broadcast(said, 0)
    return bool(said)
