"""ResNet-18 at any base width: the paper's ablation network, and the architecture of both embedded models."""

import torch
from torch import Tensor, nn


class PSiLU(nn.Module):
    """Parametric SiLU, x * sigmoid(a x), one learnable ``a`` a module (Dai et al. 2022); begins as SiLU (a = 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.a * x)


class PSSiLU(nn.Module):
    """Parametric shifted SiLU, x * (sigmoid(a x) - b) / (1 - b), two learnable scalars a module (Dai et al. 2022).

    Begins as SiLU (a = 1, b = 0; neither the paper nor its code is known to say how). ``b`` counts as at most 0.9, so
    that the quotient stays finite.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        b = self.b.clamp(max=0.9)
        return x * ((torch.sigmoid(self.a * x) - b) / (1 - b))


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "psilu": PSiLU,
    "pssilu": PSSiLU,
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; one activation on the main path, one after the addition."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = activation()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act2(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem (He et al. 2016, CIFAR form): 17 activations, as in paper Table 10.

    Images are (batch, in_channels, height, width) in [0, 1]; the normalisation is part of the network, so that an
    attack works in pixel units. Returns logits (batch, n_classes).
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        n_classes: int,
        width: int = 64,
        activation: str = "gelu",
        in_channels: int = 3,
        pixel_mean: tuple[float, ...] = (0.5,),
        pixel_std: tuple[float, ...] = (0.25,),
    ) -> None:
        super().__init__()
        self.activation = activation
        act = ACTIVATIONS[activation]
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(1, -1, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = act()
        channels = width
        for stage in range(4):
            out_channels = width * 2**stage
            blocks = []
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(BasicBlock(channels, out_channels, stride, act))
                channels = out_channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.pixel_mean) / self.pixel_std
        x = self.act1(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
