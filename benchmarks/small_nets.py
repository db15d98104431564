"""Small adversarially trained networks, for searches that thousands of candidates have to be cheap in.

    python benchmarks/small_nets.py DIR OUT      trains ``overfitted`` on CIFAR-10 in DIR, minutes

``resnet2b``    of the alpha-beta-CROWN verifier, its weights from there (``resnet2b.pth``), Linf 2/255
``cnn_a``       likewise (``cifar_cnn_a_adv.model``)
``overfitted``  the first one trained here by PGD at 4/255 on 3,000 images until it knows them: robust overfitting (Rice
                et al. 2020, arXiv 2002.11569)
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from meansparse_cli.data.examples import stack_examples
from meansparse_cli.data.splits import load_split
from meansparse_cli.training.attack import LinfAscent, cross_entropy, uniform_start

N_IMAGES, N_EPOCHS, N_STEPS, BATCH_SIZE, LEARNING_RATE, EPS = 3000, 120, 5, 100, 1e-3, 4 / 255


class Normalised(nn.Module):
    """(x - mean) / std, a channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two convolutions with a shortcut, ReLU between them and after the addition; no batch norm."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(n_in, n_out, 3, stride, 1), nn.Conv2d(n_out, n_out, 3, 1, 1)
        self.shortcut = nn.Sequential(*[nn.Conv2d(n_in, n_out, 1, stride)] if stride > 1 else [])

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv2(functional.relu(self.conv1(x))) + self.shortcut(x))


class ResNet2b(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalised((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(functional.relu(self.conv1(self.normalise(x))))
        return self.linear2(functional.relu(self.linear1(x.flatten(1))))  # type: ignore[no-any-return]


class CnnA(nn.Sequential):
    def __init__(self) -> None:
        convolutions = nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()
        super().__init__(*convolutions, nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10))
        self.normalise = Normalised((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # not published: fits best

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalise(x)
        for i in range(8):
            x = self[i](x)
        return x


def resnet2b() -> nn.Module:
    return ResNet2b()


def cnn_a() -> nn.Module:
    return CnnA()


def overfitted() -> nn.Module:
    return ResNet2b()


def train(network: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """PGD adversarial training (Madry et al. 2018) by Adam, without augmentation, at one learning rate to the end."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    ascent = LinfAscent(network, cross_entropy, eps=EPS, step_size=EPS / 4, n_steps=N_STEPS)
    for epoch in range(N_EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH_SIZE):
            attacked = ascent(x[rows], y[rows], uniform_start(x[rows], EPS, generator))
            loss = functional.cross_entropy(network(attacked), y[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        print(f"epoch {epoch + 1} of {N_EPOCHS}: loss {loss.item():.3f}", file=sys.stderr)
    return network.eval()


def main() -> None:
    data_dir, out = map(Path, sys.argv[1:3])
    x, y = stack_examples(load_split("cifar10", data_dir, "calibration"))
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:N_IMAGES]
    save_file(train(overfitted(), x[rows], y[rows]).state_dict(), out / "overfitted.safetensors")
    print(out / "overfitted.safetensors")


if __name__ == "__main__":
    main()
