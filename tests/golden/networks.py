"""The network of the golden runs: three sites of different depths, weights that depend on this file alone."""

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Images (n, 3, 4, 4) -> logits (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.act1, self.act2, self.act3 = nn.GELU(), nn.ReLU(), nn.SiLU()
        self.linear, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x) + x)
        return self.head(self.act3(self.linear(4 * x.mean((2, 3)))))


def tiny() -> nn.Module:
    """Weights by a formula: the random numbers of another torch are not asked for."""
    model = Tiny()
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            steps = torch.arange(weight.numel(), dtype=torch.float64)
            values = torch.sin(steps * 12.9898 + 78.233 * (number + 1)) * 0.05
            weight.copy_(values.view_as(weight) * (0.2 if name.endswith("bias") else 1.0))
        # a class for each colour: the colour itself, less the two others
        model.conv1.weight[:3, :, 1, 1] += 3 * torch.eye(3) - 1
        model.linear.weight[:3, :3] += torch.eye(3)
        model.head.weight[:3, :3] += 8 * torch.eye(3)
        model.head.bias[3] += 1  # and one for no colour
    return model.eval()
