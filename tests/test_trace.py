"""What the tracer says of an activation: its channel axis, whether it is a gate, and its place on residual paths."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meansparse_cli.models.networks import ResNet18
from meansparse_cli.sites.channels import axes_after_moving
from meansparse_cli.sites.find import Site, find_sites
from meansparse_cli.sites.rules import select_sites


class Net(nn.Module):
    """A network with a forward pass of the test's own; ``layers`` by name."""

    def __init__(self, forward: Callable[[nn.ModuleDict, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self._forward = nn.ModuleDict(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.layers, x)


def sites_of(forward: Callable[[nn.ModuleDict, Tensor], Tensor], **layers: nn.Module) -> list[Site]:
    return find_sites(Net(forward, **layers).eval(), torch.rand(2, 3, 8, 8))


def conv(n_in: int = 8, n_out: int = 8) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1)


# ---- residual paths


def test_resnet18_has_the_papers_families() -> None:
    """Paper, Tables 10 and 11: 0 is the stem, odd indices the main path, even ones after an addition."""
    sites = find_sites(ResNet18(n_classes=10, width=4), torch.rand(2, 3, 32, 32))
    assert [s.index for s in select_sites(sites, "main-path")] == list(range(1, 17, 2))
    assert [s.index for s in select_sites(sites, "after-addition")] == list(range(2, 17, 2))


def test_pre_activation_blocks_look_through_the_batch_norm() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        x = m["stem"](x)
        x = x + m["b"](F.relu(m["a"](F.relu(m["bn1"](x)))))
        x = x + m["d"](F.relu(m["c"](F.relu(m["bn2"](x)))))
        return F.relu(m["bn3"](x)).mean((2, 3))

    norms = {f"bn{i}": nn.BatchNorm2d(8) for i in (1, 2, 3)}
    sites = sites_of(forward, stem=conv(3), a=conv(), b=conv(), c=conv(), d=conv(), **norms)
    assert [s.after_addition for s in sites] == [False, False, True, False, True]
    assert [s.main_path for s in sites] == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("between", "is_after"),
    [
        (lambda m, x: x, True),
        (lambda m, x: 0.5 * x + 1, True),
        (lambda m, x: m["gn"](x), True),
        (lambda m, x: F.dropout(x, training=False).contiguous().clone(), True),
        (lambda m, x: m["ln"](x.permute(0, 2, 3, 1)), True),
        (lambda m, x: m["b"](x), False),
        (lambda m, x: x.square(), False),
        (lambda m, x: F.max_pool2d(x, 2), False),
        (lambda m, x: x * x.mean((2, 3), keepdim=True), False),
    ],
)
def test_what_may_stand_between_addition_and_activation(
    between: Callable[[nn.ModuleDict, Tensor], Tensor], is_after: bool
) -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        x = m["stem"](x)
        return F.relu(between(m, x + m["a"](x))).mean((2, 3))

    layers = {"stem": conv(3), "a": conv(), "b": conv(), "gn": nn.GroupNorm(2, 8), "ln": nn.LayerNorm(8)}
    (site,) = sites_of(forward, **layers)
    assert site.after_addition is is_after


def in_place(m: nn.ModuleDict, x: Tensor) -> Tensor:
    x = m["stem"](x)
    out = m["a"](x)
    out += x
    return out


@pytest.mark.parametrize(
    ("addition", "is_residual"),
    [
        (in_place, True),
        (lambda m, x: torch.add(m["a"](y := m["stem"](x)), m["b"](y)), True),
        (lambda m, x: sum([m["a"](y := m["stem"](x)), y]), True),
        (lambda m, x: m["stem"](x) + m.bias, False),  # a position embedding
        (lambda m, x: (y := m["stem"](x)) + 0.044715 * y**3, False),  # inside a GELU by hand
        (lambda m, x: m["stem"](x) + m["other"](x), False),  # two networks on one image
        (lambda m, x: m["stem"](x) + 1, False),
    ],
)
def test_what_a_residual_addition_is(addition: Callable[[nn.ModuleDict, Tensor], Tensor], is_residual: bool) -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return F.relu(addition(m, x)).mean((2, 3))

    net = Net(forward, stem=conv(3), other=conv(3), a=conv(), b=conv())
    net.layers.bias = nn.Parameter(torch.randn(1, 8, 8, 8))
    (site,) = find_sites(net.eval(), torch.rand(2, 3, 8, 8))
    assert site.after_addition is is_residual


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return 2 * x


class Hidden(nn.Module):
    """A layer whose result comes out of a custom autograd function, which no trace sees into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return _Double.apply(self.conv(x))  # type: ignore[no-any-return]


def test_a_custom_autograd_function_does_not_hide_an_addition() -> None:
    (site,) = sites_of(lambda m, x: F.relu((y := m["stem"](x)) + m["hidden"](y)), stem=conv(3), hidden=Hidden())
    assert (site.after_addition, site.channel_axis) == (True, 1)


# ---- gates


def squeeze(m: nn.ModuleDict, x: Tensor) -> Tensor:
    return torch.sigmoid(m["up"](F.relu(m["down"](x.mean((2, 3), keepdim=True)))))


@pytest.mark.parametrize(
    ("forward", "gates"),
    [
        (lambda m, x: (y := F.relu(m["stem"](x))) * squeeze(m, y), [False, True]),
        (lambda m, x: (y := F.relu(m["stem"](x))) * squeeze(m, y).expand_as(y), [False, True]),
        (lambda m, x: (y := F.relu(m["stem"](x))).mul_(squeeze(m, y)), [False, True]),
        # global features that are put back beside the others, or pooled for the head, scale nothing
        (lambda m, x: torch.cat([y := F.relu(m["stem"](x)), squeeze(m, y).expand_as(y)], 1), [False, False]),
        (lambda m, x: squeeze(m, F.relu(m["stem"](x))), [False, False]),
        # a Swish by hand multiplies too
        (lambda m, x: (y := m["stem"](x)) * torch.sigmoid(y) + F.relu(y), [False]),
    ],
)
def test_a_gate_is_what_scales_other_features(
    forward: Callable[[nn.ModuleDict, Tensor], Tensor], gates: list[bool]
) -> None:
    layers = {"stem": conv(3), "down": nn.Conv2d(8, 2, 1), "up": nn.Conv2d(2, 8, 1)}
    sites = sites_of(lambda m, x: forward(m, x).mean((2, 3)), **layers)
    assert [s.gate for s in sites] == gates


# ---- channel axis: batch 2, and all other axes of one size, so that no shape gives the answer away


@pytest.mark.parametrize(
    ("move", "axis"),
    [
        (lambda x: x.permute(0, 2, 3, 1), 3),
        (lambda x: x.permute(2, 1, 3, 0), 1),
        (lambda x: x.transpose(1, 2), 2),
        (lambda x: x.flatten(2), 1),
        (lambda x: x.flatten(2).transpose(1, 2), 2),
        (lambda x: x.movedim(1, -1).reshape(-1, 8, 8), 2),
        (lambda x: x.movedim(1, -1).reshape(-1, 4, 2, 8, 8).permute(0, 4, 1, 2, 3), 1),
        (lambda x: x.mean(2), 1),
        (lambda x: x.permute(0, 2, 3, 1).mean(1), 2),
        (lambda x: x.permute(0, 2, 3, 1)[:, 3], 2),
        (lambda x: x.swapaxes(1, 3).mT, 2),
        (lambda x: x.unflatten(3, (2, 4)), 1),
        (lambda x: x.split(4, dim=2)[1], 1),
        (lambda x: x.permute(0, 2, 3, 1).chunk(2, dim=1)[0], 3),
        (lambda x: torch.cat([x, x], 2).roll(1, 1), 1),
        (lambda x: (x + 1).contiguous() / 3, 1),
        (lambda x: F.max_pool2d(x, 2), 1),
        (lambda x: F.layer_norm(x, (8, 8, 8)), 1),
    ],
)
def test_channel_axis_follows_what_is_done_to_it(move: Callable[[Tensor], Tensor], axis: int) -> None:
    (site,) = sites_of(lambda m, x: F.relu(move(m["stem"](x))), stem=conv(3))
    assert site.channel_axis == axis
    # the same from the outside: a bias of the convolution moves what lies along that axis, one place a channel
    stem = conv(3)
    with torch.no_grad():
        stem.weight.zero_()
        stem.bias.copy_(torch.arange(8.0) if stem.bias is not None else 0)  # type: ignore[union-attr]
        y = move(stem(torch.rand(2, 3, 8, 8)))
    others = [i for i in range(y.ndim) if i != axis]
    assert float(y.std(dim=others).max()) < float(y.mean(dim=others).std())


def test_a_matrix_of_mixed_channels_has_no_channel_axis_of_its_own() -> None:
    assert axes_after_moving(torch.flatten, (torch.zeros(2, 3, 4), 1), {}, (2, 3, 4), 1) == [None]
    assert axes_after_moving(torch.relu, (torch.zeros(2, 3, 4),), {}, (2, 3, 4), 1) is None


# ---- activations in disguise


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), ByHand(), Quick()])
def test_gelu_as_a_module(activation: nn.Module) -> None:
    (site,) = sites_of(lambda m, x: m["act"](m["stem"](x)), stem=conv(3), act=activation)
    assert (site.name, site.kind, site.after_addition) == ("layers.act", "module", False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["GELU", "GELUTanh", "QuickGELU"])
def test_gelu_of_timm(name: str) -> None:
    from timm.layers import activations

    (site,) = sites_of(lambda m, x: m["act"](m["stem"](x)), stem=conv(3), act=getattr(activations, name)())
    assert (site.kind, site.operation) == ("module", name)


@pytest.mark.parametrize(
    "function", [F.gelu, torch._C._nn.gelu, lambda x: F.gelu(x, approximate="tanh"), lambda x: F.gelu(input=x)]
)
def test_gelu_as_a_function(function: Callable[[Tensor], Tensor]) -> None:
    (site,) = sites_of(lambda m, x: function(m["stem"](x)), stem=conv(3))
    assert (site.kind, site.operation) == ("function", "gelu")


@pytest.mark.parametrize("n_images", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rounding_does_not_decide_what_an_activation_is(n_images: int, layout: torch.memory_format) -> None:
    """Vectorised kernels round the last few elements of a tensor in another way than the others."""
    net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.GELU(), nn.Flatten(), nn.Linear(7 * 25, 3)).to(memory_format=layout)
    sites = find_sites(net, torch.rand(n_images, 3, 7, 7).to(memory_format=layout))
    assert [(s.name, s.kind) for s in sites] == [("1", "module")]
