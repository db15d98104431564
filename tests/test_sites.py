import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meansparse_cli.models.networks import ResNet18
from meansparse_cli.sites.activations import is_elementwise_nonlinear
from meansparse_cli.sites.find import find_sites


def test_resnet18_has_the_papers_17_sites() -> None:
    sites = find_sites(ResNet18(n_classes=10, width=4), torch.rand(2, 3, 32, 32))
    assert [s.name for s in sites][:3] == ["act1", "layer1.0.act1", "layer1.0.act2"]
    assert len(sites) == 17
    assert [s.channels for s in sites] == [4] * 5 + [8] * 4 + [16] * 4 + [32] * 4
    assert {s.layout for s in sites} == {"channels-first"}
    assert not any(s.gate for s in sites)


def test_reused_modules_and_functions_get_one_site_a_call(network: nn.Module, images: Tensor) -> None:
    names = [(s.name, s.kind, s.layout) for s in find_sites(network, images)]
    if hasattr(network, "relu"):
        first = "channels-first"
        assert names == [("relu#0", "module", first), ("act", "module", first), ("relu#1", "module", first)]
    else:
        layouts = ["channels-first"] * 3 + ["channels-last"]
        assert names == [(f"(model)#{i}", "function", layout) for i, layout in enumerate(layouts)]


def test_squeeze_and_excitation_is_a_gate() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up, self.act, self.gate = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        Squeeze(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )
    sites = find_sites(net, torch.rand(2, 3, 8, 8))
    assert [(s.name, s.gate) for s in sites] == [("1", False), ("2.act", True), ("2.gate", True), ("6", False)]
    assert [(s.index, s.name) for s in sites if not s.gate] == [(0, "1"), (3, "6")]


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Swish.apply(x)  # type: ignore[no-any-return]


class Written(nn.Module):
    """An activation nobody has heard of."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs())


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.ELU(), nn.PReLU(4), nn.Hardswish(), Swish(), Written()]
)
def test_any_elementwise_nonlinear_module_is_an_activation(activation: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.Flatten(), nn.Linear(144, 10))
    (site,) = find_sites(net, torch.rand(2, 3, 8, 8))
    assert (site.name, site.kind, site.operation) == ("1", "module", type(activation).__name__)


class SwishOfModules(nn.Module):
    """As many repositories write it: the sigmoid inside is a part of the activation, no site of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)


class HardSigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + 3) / 6  # type: ignore[no-any-return]


class HardSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = HardSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)


class Wrapper(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("activation", "torchs"), [(SwishOfModules(), nn.SiLU()), (HardSwish(), nn.Hardswish())], ids=["swish", "h_swish"]
)
def test_an_activation_made_of_modules_is_one_site_at_its_input(activation: nn.Module, torchs: nn.Module) -> None:
    def network(act: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Flatten(), nn.Linear(144, 2)).eval()

    x, found = torch.rand(5, 3, 8, 8), []
    for act in (activation, torchs):
        model = network(act)
        (site,) = find_sites(model, x)
        found.append((site.name, site.gate, site.channels, site.shape))
    assert found[0] == found[1] == ("1", False, 4, (4, 6, 6))


def test_a_module_that_only_calls_an_activation_is_not_the_site() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Wrapper(nn.GELU()), Wrapper(Wrapper(SwishOfModules())))
    assert [site.name for site in find_sites(model.eval(), torch.rand(2, 3, 8, 8))] == ["1.act", "2.act.act"]


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x - 1


class Standardise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm2d(4).eval(), Scale(), Standardise(), nn.Softmax(1), nn.Identity(), nn.LayerNorm(6), nn.MaxPool2d(1)],
)
def test_linear_or_mixing_modules_are_not(module: nn.Module) -> None:
    assert not is_elementwise_nonlinear(module, torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_activations_are_seen_at_any_scale_of_input(scale: float) -> None:
    assert is_elementwise_nonlinear(nn.ReLU(), scale * torch.randn(2, 4, 6, 6))
    assert is_elementwise_nonlinear(nn.GELU(), scale * torch.randn(2, 4, 6, 6))


def test_tokens() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            return self.down(F.gelu(self.up(tokens))).mean(1)

    (site,) = find_sites(Block(), torch.rand(2, 3, 16, 16))
    assert (site.layout, site.channel_axis, site.channels, site.shape) == ("tokens", 2, 24, (16, 24))


def test_permuted_to_channels_first_before_the_activation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act, self.head = nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x.permute(0, 2, 3, 1))
            return self.head(self.act(x.permute(0, 3, 1, 2)).mean((2, 3)))

    (site,) = find_sites(Net(), torch.rand(2, 3, 8, 8))  # height, width and channels are all 8
    assert (site.layout, site.channel_axis) == ("channels-first", 1)
