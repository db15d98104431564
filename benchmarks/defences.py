"""Three published defences that are not MeanSparse, as networks for ``meansparse evaluate --defence``.

    python benchmarks/defences.py DIR OUT      trains ``winners`` and ``rectified`` on CIFAR-10 in DIR, minutes

``quantised``   4 levels a pixel in front of the embedded CIFAR-10 model (feature squeezing, Xu et al. 2018,
                arXiv 1704.01155)
``resized``     its images shrunk and padded at random (Xie et al. 2018, arXiv 1711.01991)
``winners``     a small network whose activations keep an image's largest tenth (k-WTA, Xiao et al. 2020,
                arXiv 1905.10510)
``rectified``   the same network with ReLU, to compare with

The commands and what they gave: docs/results/defences.md.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from meansparse_cli.data.examples import stack_examples
from meansparse_cli.data.splits import load_split
from meansparse_cli.models.source import load_model, resolve_model

N_EPOCHS, BATCH_SIZE, LEARNING_RATE = 5, 128, 3e-3


class Levels(nn.Module):
    """Pixels rounded to ``n`` levels of [0, 1]."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.n_steps = n - 1

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.n_steps).round() / self.n_steps


class Resized(nn.Module):
    """Shrunk to 26 to 31 pixels, at a random place on a field of zeros of 32; another size and place in each pass."""

    def forward(self, x: Tensor) -> Tensor:
        size = 26 + int(torch.randint(6, ()))
        small = functional.interpolate(x, size=(size, size), mode="nearest")
        left, top = (int(torch.randint(33 - size, ())) for _ in range(2))
        return functional.pad(small, (left, 32 - size - left, top, 32 - size - top))


class Winners(nn.Module):
    """The largest tenth of an image's values at this layer; the others become zero."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        smallest = flat.topk(flat.shape[1] // 10, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        return torch.where(flat >= smallest, flat, 0.0).view_as(x)


class Behind(nn.Module):
    """``front`` before the embedded model."""

    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        self.front, self.network = front, load_model(resolve_model("resnet18-w16"))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.front(x))  # type: ignore[no-any-return]


def quantised() -> nn.Module:
    return Behind(Levels())


def resized() -> nn.Module:
    return Behind(Resized())


def _small(activation: type[nn.Module]) -> nn.Module:
    network = nn.Sequential()
    for i, (n_in, n_out, stride) in enumerate(((3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2))):
        network.add_module(f"conv{i}", nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False))
        network.add_module(f"norm{i}", nn.BatchNorm2d(n_out))
        network.add_module(f"active{i}", activation())
    network.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)))
    return network


def winners() -> nn.Module:
    return _small(Winners)


def rectified() -> nn.Module:
    return _small(nn.ReLU)


def train(network: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """By Adam on clean images, flipped at random, with a rate that falls along a cosine."""
    torch.manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, N_EPOCHS * (len(x) // BATCH_SIZE))
    for epoch in range(N_EPOCHS):
        for rows in torch.randperm(len(x))[: len(x) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            images = torch.where(torch.rand(BATCH_SIZE, 1, 1, 1) < 0.5, x[rows], x[rows].flip(3))
            loss = functional.cross_entropy(network(images), y[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {N_EPOCHS}: loss {loss.item():.3f}", file=sys.stderr)
    return network.eval()


def main() -> None:
    data_dir, out = map(Path, sys.argv[1:3])
    x, y = stack_examples(load_split("cifar10", data_dir, "calibration"))
    out.mkdir(parents=True, exist_ok=True)
    for make in (winners, rectified):
        torch.manual_seed(0)
        save_file(train(make(), x, y).state_dict(), out / f"{make.__name__}.safetensors")
        print(out / f"{make.__name__}.safetensors")


if __name__ == "__main__":
    main()
