"""The attack inside adversarial training, and the one that measures a network while it trains.

Sign-gradient ascent within an Linf ball (Madry et al. 2018; TRADES: Zhang et al. 2019). The network is in eval mode
meanwhile, so that the attack neither moves nor depends on the batch's own batch-norm statistics, and its parameters are
frozen, so that only the gradient of the images is computed. Nothing here waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.judge import under_attack

Forward = Callable[[Tensor], Tensor]
AttackLoss = Callable[[Tensor, Tensor], Tensor]
BATCH_SIZE = 250
"""Images at a time that a network is measured on."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the batch: the sign of an image's gradient must not depend on how many others there are."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def divergence(logits: Tensor, clean_probabilities: Tensor) -> Tensor:
    """KL(clean, adversarial) summed over the batch: what TRADES maximises."""
    return F.kl_div(F.log_softmax(logits.float(), 1), clean_probabilities, reduction="sum")


@dataclass(eq=False)
class LinfAscent:
    """``n_steps`` of ascent on ``loss(forward(adv), target)`` from ``start``; the last iterate, inside ball and [0, 1].

    With ``cuda_graph`` one step is recorded and replayed: the device no longer waits for Python, which more than halves
    the time of narrow networks. All batches must then have one shape, and ``forward``'s parameters keep their storage.
    """

    forward: Forward
    loss: AttackLoss
    eps: float
    step_size: float
    n_steps: int
    cuda_graph: bool = False
    _graph: torch.cuda.CUDAGraph | None = field(default=None, init=False)
    _buffers: list[Tensor] = field(default_factory=list, init=False)

    def __call__(self, x: Tensor, target: Tensor, start: Tensor) -> Tensor:
        low, high = (x - self.eps).clamp_(min=0), (x + self.eps).clamp_(max=1)
        adv = torch.clamp(start, low, high)
        if not self.cuda_graph:
            for _ in range(self.n_steps):
                adv = self._step(adv, target, low, high)
            return adv
        if self._graph is None:
            self._record(adv, target, low, high)
        assert self._graph is not None
        for buffer, value in zip(self._buffers, (adv, target, low, high), strict=True):
            buffer.copy_(value)
        for _ in range(self.n_steps):
            self._graph.replay()
        return self._buffers[0].clone()

    def _step(self, adv: Tensor, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
        adv = adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(self.loss(self.forward(adv), target), adv)
        return torch.clamp(adv.detach() + self.step_size * grad.sign(), low, high)

    def _record(self, *values: Tensor) -> None:
        self._buffers = [value.clone() for value in values]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their algorithms and compilers compile before the recording
                self._step(*self._buffers)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._buffers[0].copy_(self._step(*self._buffers))


def uniform_start(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """A point drawn uniformly from the Linf ball around ``x``; ``generator`` is on the device of ``x``."""
    return x + torch.empty_like(x).uniform_(-eps, eps, generator=generator)


def pgd_outcomes(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    eps: float,
    n_steps: int,
    device: str,
    precision: str = "fp32",
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Which images are classified correctly, clean and after PGD of step eps / 4; two (n,) bool tensors.

    ``pixels`` uint8 (n, height, width, channels), ``labels`` (n,). Random starts depend on an image's position and on
    ``BATCH_SIZE``.
    """
    forward = in_precision(model, device, precision)
    ascent = LinfAscent(forward, cross_entropy, eps=eps, step_size=eps / 4, n_steps=n_steps)
    clean, robust = [], []
    with under_attack(model):
        for start in range(0, len(labels), BATCH_SIZE):
            x = pixels[start : start + BATCH_SIZE].to(device).permute(0, 3, 1, 2).float() / 255
            x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            y = labels[start : start + BATCH_SIZE].to(device)
            generator = torch.Generator(device).manual_seed(start)
            adv = ascent(x, y, uniform_start(x, eps, generator))
            with torch.no_grad():
                clean.append(forward(x).argmax(1) == y)
                robust.append(forward(adv).argmax(1) == y)
    return torch.cat(clean).cpu(), torch.cat(robust).cpu()


def in_precision(model: Forward, device: str, precision: str) -> Forward:
    """``model`` under autocast to bfloat16, or as it is."""
    if precision == "fp32":
        return model
    device_type = torch.device(device).type

    def forward(x: Tensor) -> Tensor:
        # without the cache of cast weights: it must not outlive an optimiser step, nor be part of a recorded graph
        with torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False):
            return model(x)

    return forward
