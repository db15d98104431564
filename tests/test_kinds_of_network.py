"""Networks of every kind go through the same circle: find, calibrate, insert, change alpha, remove."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from meansparse_cli.operator.active import set_alpha
from meansparse_cli.operator.calibration import calibrate_channels
from meansparse_cli.operator.insertion import insert, remove
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.sites.find import Site, find_sites, unwrap


class OneRelu(nn.Module):
    """One ReLU for everything, used before and after two residual additions, and on the pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))
        self.hidden, self.head = nn.Linear(6, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for first, second in zip(self.convs[::2], self.convs[1::2], strict=True):
            x = self.relu(second(self.relu(first(x))) + x)
        return self.head(self.relu(self.hidden(x.mean((2, 3)))))


class Nhwc(nn.Module):
    """Channels on the last axis throughout, as in ConvNeXt's MLP; height, width and hidden channels are all 8."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.act = nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU()
        self.up, self.down, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.permute(0, 2, 3, 1))
        x = x + self.down(self.act(self.up(self.norm(x))))
        return self.head(F.silu(x).mean((1, 2)))


class Transformer(nn.Module):
    """Tokens; windows folded into the batch axis, as in Swin; a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Conv2d(3, 8, 2, stride=2), nn.Parameter(torch.randn(1, 1, 8))
        self.qkv, self.up, self.down, self.act = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        windows = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(-1, 4, 8)
        windows = windows + self.down(self.act(self.up(windows)))
        x = windows.view(len(x), 16, 8)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        x = x + self.down(self.act(self.up(x)))
        return self.head(torch.tanh(x[:, 0]))


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()


def compiled_first(net: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(net, backend="eager")  # type: ignore[assignment]
    with torch.no_grad():
        compiled(torch.rand(2, 3, 8, 8))  # compiled for real before anything is found or inserted
    return compiled


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    with torch.no_grad():
        net(torch.rand(2, 3, 8, 8))
    return net


def compiled_inside(net: OneRelu) -> nn.Module:
    """A part of the network is compiled, with an activation of its own, and has run."""
    net.convs[0] = torch.compile(nn.Sequential(net.convs[0], nn.GELU()), backend="eager")  # type: ignore[assignment]
    with torch.no_grad():
        net(torch.rand(2, 3, 8, 8))
    return net


def torchvision_resnet() -> nn.Module:
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def timm_convnext() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm

        net: nn.Module = timm.create_model("convnext_atto", num_classes=10, pretrained=False, patch_size=1)
    return net


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "one-relu": (OneRelu, 6),
    "nhwc": (Nhwc, 2),
    "tokens": (Transformer, 3),
    "memory-format": (lambda: OneRelu().to(memory_format=torch.channels_last), 6),
    "data-parallel": (lambda: nn.DataParallel(OneRelu()), 6),
    "compiled-first": (lambda: compiled_first(small()), 1),
    "compiled-functions-first": (lambda: compiled_first(Nhwc().eval()), 2),
    "compiled-in-place": (lambda: compiled_in_place(small()), 1),
    "compiled-functions-in-place": (lambda: compiled_in_place(Nhwc().eval()), 2),
    "compiled-inside": (lambda: compiled_inside(OneRelu().eval()), 7),
    "torchvision": (torchvision_resnet, 9),
    "timm": (timm_convnext, 12),
}


def images_of(n: int, generator_seed: int = 0) -> Tensor:
    return torch.rand((n, 3, 8, 8), generator=torch.Generator().manual_seed(generator_seed))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every tensor's
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_round(kind: str) -> None:
    build, n_sites = KINDS[kind]
    torch.manual_seed(3)
    net = build().eval()
    x, pictures = images_of(4), images_of(24, 1)
    if kind == "memory-format":
        x = x.to(memory_format=torch.channels_last)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        expected = net(x)
    sites = find_sites(net, x)
    assert len(sites) == n_sites
    dataset = TensorDataset(pictures, torch.zeros(len(pictures), dtype=torch.long))
    statistics = calibrate_channels(net, sites, Subset(dataset, range(24)), batch_size=10)  # type: ignore[arg-type]
    assert [len(s.mean) for s in statistics] == [s.channels for s in sites]
    operators = [MeanSparse(s.mean, s.std, 0.0, site.channel_axis) for s, site in zip(statistics, sites, strict=True)]
    model = insert(net, sites, operators).eval()
    with torch.no_grad():
        assert torch.equal(model(x), expected), "alpha 0 is the base model bit by bit"
        for site in sites:  # each site is really reached
            operator = model.at(site)
            assert isinstance(operator, MeanSparse)
            operator.set_alpha(1e6)
            assert not torch.equal(model(x), expected), site.name
            operator.set_alpha(0)
    set_alpha(model, 0.5)
    images = x.clone().requires_grad_()
    model(images).sum().backward()
    assert images.grad is not None and bool(torch.isfinite(images.grad).all())
    assert remove(model) is unwrap(net)
    with torch.no_grad():
        assert torch.equal(net(x), expected)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_sparsified_model_can_be_compiled_whole() -> None:
    net, x = OneRelu().eval(), images_of(4)
    sites = find_sites(net, x)
    model = insert(net, sites, [MeanSparse(torch.zeros(s.channels), torch.ones(s.channels), 0.3) for s in sites]).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for alpha in (0.3, 0.6, 0.0):
            set_alpha(model, alpha)
            assert torch.allclose(compiled(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    ("build", "producers"), [(OneRelu, ["stem", "convs.0", "convs.2", "hidden"]), (Nhwc, ["up"]), (Transformer, ["up"])]
)
def test_permuting_the_channels_of_a_producer_permutes_the_statistics(
    build: Callable[[], nn.Module], producers: list[str]
) -> None:
    """What a layer's outputs are is known without any tracing: its weights' first axis. Statistics must follow it."""
    dataset = TensorDataset(images_of(12), torch.zeros(12, dtype=torch.long))

    def means(net: nn.Module, sites: list[Site]) -> list[Tensor]:
        return [s.mean for s in calibrate_channels(net, sites, Subset(dataset, range(12)), batch_size=12)]  # type: ignore[arg-type]

    for producer in producers:
        torch.manual_seed(5)
        net = build().eval()
        layer = net.get_submodule(producer)
        assert isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
        sites = find_sites(net, images_of(2))
        reached: list[int] = []  # the sites whose input this layer alone makes
        plain = means(net, sites)
        order = torch.randperm(len(layer.bias))
        with torch.no_grad():
            layer.bias.copy_(layer.bias[order])
            layer.weight.copy_(layer.weight[order])
        for i, (a, b) in enumerate(zip(plain, means(net, sites), strict=True)):
            if len(a) == len(order) and torch.allclose(b, a[order], atol=1e-7) and not torch.allclose(a, b, atol=1e-4):
                reached.append(i)
        assert reached, f"no site follows the channels of {producer}"
