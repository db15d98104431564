import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.errors import ConfigError, SiteError
from meansparse_cli.operator.active import alpha_set, backward_rule, example_alphas_set, set_alpha
from meansparse_cli.operator.function import mean_sparsify
from meansparse_cli.operator.insertion import SparsifiedModel, insert, remove
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.sites.find import find_sites


def sparsified(network: nn.Module, images: Tensor, alpha: float) -> SparsifiedModel:
    sites = find_sites(network, images)
    torch.manual_seed(2)
    modules = [MeanSparse(torch.randn(s.channels) / 4, torch.rand(s.channels), alpha, s.channel_axis) for s in sites]
    return insert(network, sites, modules)


class Windows(nn.Module):
    """Folds two windows an image into the batch axis around its activation, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        windows = x.view(n * 2, 3, 4, 2)
        return self.act(windows).reshape(n, -1)


@pytest.mark.parametrize("network", [nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten()), Windows()])
def test_an_alpha_for_each_example_gives_what_each_alpha_gives_alone(network: nn.Module) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 4, 4)
    model = sparsified(network, images, 0.0)
    alphas = [0.0, 0.3, 0.8]

    def logits_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = model(x)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    with example_alphas_set(model, torch.tensor(alphas)):
        together = logits_and_gradient(images)
    for i, alpha in enumerate(alphas):
        with alpha_set(model, alpha):
            alone = logits_and_gradient(images[i : i + 1])
        assert torch.equal(together[0][i], alone[0][0])
        assert torch.equal(together[1][i], alone[1][0])
    assert not torch.equal(together[0][2], model(images)[2])


def test_an_alpha_of_zero_among_others_keeps_the_gradient_of_a_dead_channel() -> None:
    operator = MeanSparse(torch.zeros(2), torch.tensor([0.0, 1.0]))
    operator.example_alphas = torch.tensor([0.0, 0.5])
    x = torch.zeros(2, 2, 1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(operator(x).sum(), x)
    assert gradient.flatten().tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("alphas", [torch.tensor([-0.1]), torch.tensor([float("nan")]), torch.zeros(2, 7)])
def test_alphas_that_cannot_be_are_refused(alphas: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model = sparsified(network, torch.randn(2, 3, 4, 4), 0.1)
    with pytest.raises(ConfigError), example_alphas_set(model, alphas):
        pass


def test_operator_on_known_values() -> None:
    x = torch.tensor([0.25, 0.375, 0.5, 0.75, 0.875, float("nan")])
    out = mean_sparsify(x, torch.tensor(0.5), torch.tensor(0.25))
    # 0.25 and 0.75 lie exactly on the edge, which belongs to the band
    assert torch.equal(out[:5], torch.tensor([0.5, 0.5, 0.5, 0.5, 0.875]))
    assert out[5].isnan()


def test_gradient_is_zero_inside_and_one_outside() -> None:
    x = torch.tensor([0.1, 0.45, 0.55, 0.9], requires_grad=True)
    mean_sparsify(x, torch.tensor(0.5), torch.tensor(0.2)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0, 0, 1]


def test_straight_through_keeps_values_and_passes_gradients() -> None:
    x = torch.randn(50, requires_grad=True)
    plain = mean_sparsify(x, torch.tensor(0.1), torch.tensor(0.5))
    bpda = mean_sparsify(x, torch.tensor(0.1), torch.tensor(0.5), straight_through=True)
    assert torch.equal(plain, bpda)
    bpda.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(50))


@pytest.mark.parametrize(("shape", "axis"), [((4, 5, 3, 3), 1), ((4, 3, 3, 5), 3), ((4, 7, 5), 2), ((4, 5), 1)])
def test_module_works_along_its_channel_axis(shape: tuple[int, ...], axis: int) -> None:
    x, mean, std = torch.randn(shape), torch.randn(5), torch.rand(5)
    out = MeanSparse(mean, std, 0.7, axis)(x)
    moved, expected = x.movedim(axis, -1), out.movedim(axis, -1)
    for channel in range(5):
        part = moved[..., channel]
        inside = (part - mean[channel]).abs() <= torch.tensor(0.7) * std[channel]
        assert torch.equal(expected[..., channel], torch.where(inside, mean[channel], part))


def test_alpha_zero_is_bit_identical_even_in_dead_channels() -> None:
    x = torch.zeros(2, 3, 2, 2, requires_grad=True)  # a constant channel: every value equals the mean
    module = MeanSparse(torch.zeros(3), torch.zeros(3), 0.0)
    assert module(x) is x
    set_alpha(module, 0.2)
    module(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))  # type: ignore[arg-type]


def test_alpha_zero_gives_the_base_model_bit_for_bit(network: nn.Module, images: Tensor) -> None:
    base = network(images)
    model = sparsified(network, images, 0.0)
    assert torch.equal(model(images), base)
    x = images.clone().requires_grad_()
    (mine,) = torch.autograd.grad(model(x).square().sum(), x)
    removed = remove(model)
    (theirs,) = torch.autograd.grad(removed(x).square().sum(), x)
    assert torch.equal(mine, theirs)


def test_remove_gives_the_same_model_back(network: nn.Module, images: Tensor) -> None:
    names, base = [n for n, _ in network.named_modules()], network(images)
    model = sparsified(network, images, 0.5)
    assert not torch.equal(model(images), base)
    assert remove(model) is network
    assert [n for n, _ in network.named_modules()] == names
    assert torch.equal(network(images), base)
    sparsified(network, images, 0.5)  # and it can be done again


def test_every_site_is_applied(network: nn.Module, images: Tensor) -> None:
    sites = find_sites(network, images)
    seen: list[str] = []

    class Witness(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.name)
            return x

    insert(network, sites, [Witness(s.name) for s in sites])(images)
    assert seen == [s.name for s in sites]


def test_same_as_editing_the_source() -> None:
    class Edited(nn.Module):
        def __init__(self, conv: nn.Conv2d, op: nn.Module) -> None:
            super().__init__()
            self.conv, self.op = conv, op

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.op(self.conv(x)))

    conv, op = nn.Conv2d(3, 4, 3), MeanSparse(torch.randn(4) / 5, torch.rand(4), 0.6)
    x = torch.rand(2, 3, 6, 6)
    base = nn.Sequential(conv, nn.ReLU())
    assert torch.equal(insert(base, find_sites(base, x), [op])(x), Edited(conv, op)(x))


def test_in_place_activation_changes_its_argument_as_before() -> None:
    class ReadsAfterwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.relu(x)  # the result is not used: only the change in place counts
            return x.mean((2, 3))

    net, x = ReadsAfterwards().eval(), torch.rand(2, 3, 6, 6)
    op = MeanSparse(torch.zeros(4), torch.ones(4), 10.0)  # everything is within ten deviations of 0
    assert torch.equal(insert(net, find_sites(net, x), [op])(x), torch.zeros(2, 4))


def test_state_dict_and_deepcopy(network: nn.Module, images: Tensor, tmp_path: Path) -> None:
    model = sparsified(network, images, 0.5)
    out, twin = model(images), copy.deepcopy(model)
    set_alpha(model, 0.0)
    assert torch.equal(twin(images), out), "a copy keeps its own alpha"
    torch.save(twin.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(model(images), out), "loading a state switches the operator on"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(network: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    model = sparsified(network, images, 0.3)
    exact = model(images)
    low = model.to(dtype)(images.to(dtype))
    assert low.dtype == dtype
    assert torch.allclose(low.float(), exact, atol=0.1)


def test_no_stage_loads_dynamo_which_would_double_its_time_to_start() -> None:
    code = "import sys, meansparse_cli.stages.evaluate; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_compiled_model_gives_the_same(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    model = sparsified(net, images, 0.4)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(images), model(images), atol=1e-6)
    with backward_rule(model, "identity"):
        assert torch.allclose(compiled(images), model(images), atol=1e-6)


def test_compiled_model_with_function_sites_gives_the_same(network: nn.Module, images: Tensor) -> None:
    model = sparsified(network, images, 0.4)
    expected = model(images)
    assert torch.allclose(torch.compile(model, backend="aot_eager")(images), expected, atol=1e-6)


def test_data_parallel_is_unwrapped(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    model = sparsified(nn.DataParallel(net), images, 0.4)  # type: ignore[arg-type]
    assert model.base is net
    replica = model._replicate_for_data_parallel()
    assert type(replica) is SparsifiedModel


def test_context_managers_restore_after_an_exception(network: nn.Module, images: Tensor) -> None:
    model = sparsified(network, images, 0.25)
    operators = [m for m in model.modules() if isinstance(m, MeanSparse)]
    with pytest.raises(KeyError), alpha_set(model, 0.75), backward_rule(model, "identity"):
        assert all(float(m.alpha) == 0.75 and m.straight_through for m in operators)
        raise KeyError
    assert all(float(m.alpha) == 0.25 and not m.straight_through for m in operators)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_bad_alpha_is_refused(alpha: float) -> None:
    module = MeanSparse(torch.zeros(2), torch.ones(2), 0.5)
    with pytest.raises(ConfigError, match="alpha"):
        set_alpha(module, alpha)
    assert float(module.alpha) == 0.5


def test_failed_insertion_leaves_the_model_alone(images: Tensor) -> None:
    from dataclasses import replace

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    (site,) = find_sites(net, images)
    module = MeanSparse(torch.zeros(4), torch.ones(4), 0.5)
    with pytest.raises(SiteError, match="no module"):
        insert(net, [site, replace(site, path="9")], [module, module])
    assert [n for n, _ in net.named_modules()] == ["", "0", "1", "2", "3"]
    assert not net[1]._forward_pre_hooks


@pytest.mark.parametrize("rule", ["identity", "soft:0.1"])
def test_an_in_place_activation_may_follow_a_replaced_gradient(rule: str) -> None:
    images = torch.randn(2, 3, 4, 4)
    model = sparsified(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(inplace=True)), images, 0.5)
    with backward_rule(model, rule):
        (gradient,) = torch.autograd.grad(model(images.requires_grad_()).sum(), images)
    assert gradient.abs().sum() > 0
