"""Our operators in place of the published ones against RobustBench's own, in each of its MeanSparse architectures."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.errors import SiteError
from meansparse_cli.models import zoo
from meansparse_cli.models.names import ZooEntry
from meansparse_cli.models.published_checkpoint import (
    PUBLISHED_FILES,
    PublishedFile,
    operator_paths,
    published_architecture,
    split_published,
)
from meansparse_cli.models.published_sites import OperatorPlace, find_published_operators, published_sites, take_out
from meansparse_cli.models.zoo import build_zoo_model
from meansparse_cli.operator.active import alpha_set, backward_rule, example_alphas_set
from meansparse_cli.operator.calibration import calibrate_channels
from meansparse_cli.operator.checkpoint import Checkpoint, sparsify
from meansparse_cli.operator.insertion import SparsifiedModel, remove
from meansparse_cli.operator.module import MeanSparse

SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (1, 2),
    "num_heads": (2, 2),
    "num_classes": 10,
}
IMAGES = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def architectures(name: str) -> Any:
    zoo.zoo_entries()  # mends robustbench's import
    import importlib

    return importlib.import_module(f"robustbench.model_zoo.architectures.{name}")


def wrn_94() -> nn.Module:
    return architectures("Meansparse_wrn_94_16").MeanSparse_DMWideResNet(depth=10, width=1, activation_fn=nn.SiLU)  # type: ignore[no-any-return]


def wrn_70() -> nn.Module:
    return architectures("Meansparse_wrn_70_16").DMWideResNet(depth=10, width=1, activation_fn=nn.SiLU)  # type: ignore[no-any-return]


def ra_wrn(module: str = "Meansparse_ra_wrn_70_16") -> nn.Module:
    return architectures(module).NormalizedWideResNet(  # type: ignore[no-any-return]
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        stem_width=8,
        depth=[2, 1, 1],
        stage_width=[8, 12, 16],
        groups=[1, 1, 1],
        activation_fn=nn.SiLU,
        se_ratio=0.25,
        se_activation=nn.ReLU,
        se_order=2,
    )


def plain_ra_wrn() -> nn.Module:
    return ra_wrn("robustarch_wide_resnet")


def swin() -> nn.Module:
    network = architectures("Meansparse_swin_L").SwinTransformer(**SWIN)
    return nn.Sequential(OrderedDict(model=network))


def convnext() -> nn.Module:
    network = plain_convnext()
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):  # a layer scale of 1e-6, as at the start of training, would hide the operators
            nn.init.ones_(parameter)
    return architectures("sparsified_model").get_sparse_model(network, "imagenet-Linf")  # type: ignore[no-any-return]


def plain_wrn() -> nn.Module:
    return architectures("dm_wide_resnet").DMWideResNet(depth=10, width=1, activation_fn=nn.SiLU)  # type: ignore[no-any-return]


def plain_swin() -> nn.Module:
    zoo.zoo_entries()
    from timm.models.swin_transformer import SwinTransformer

    return nn.Sequential(OrderedDict(model=SwinTransformer(**SWIN)))


def plain_convnext() -> nn.Module:
    zoo.zoo_entries()
    import timm

    return nn.Sequential(OrderedDict(model=timm.create_model("convnext_large", depths=(1, 1, 1, 1), num_classes=10)))


N_SITES = {wrn_94: 10, wrn_70: 10, ra_wrn: 13, swin: 12, convnext: 8}
"""Three a block and one at the end; four a block in Swin; two a block in ConvNeXt."""


def published(build: Callable[[], nn.Module], alpha: float) -> nn.Module:
    """A network whose operators have learnt their statistics by their own code."""
    torch.manual_seed(3)
    network = build().eval()
    operators = [module for module in network.modules() if hasattr(module, "threshold")]
    for operator in operators:
        operator.flag_update_statistics.fill_(1)  # type: ignore[operator, union-attr]
        operator.batch_num.fill_(1)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        network(torch.rand(8, 3, 32, 32))
    for operator in operators:
        operator.flag_update_statistics.fill_(0)  # type: ignore[operator, union-attr]
        operator.threshold.fill_(alpha)  # type: ignore[operator, union-attr]
    return network


def with_ours(theirs: nn.Module) -> SparsifiedModel:
    """A network with published operators, as ``calibrate --statistics stored`` and ``evaluate`` take it."""
    held = split_published(theirs.state_dict(), what="this model")
    base = take_out(theirs)
    sites = published_sites(base, IMAGES, held, ())
    statistics = tuple(held.statistics[str(held.path_of(site.path))] for site in sites)
    return sparsify(base, Checkpoint(tuple(sites), statistics, "published", held.alpha))


def logits_and_gradient(network: nn.Module) -> tuple[Tensor, Tensor]:
    x = IMAGES.clone().requires_grad_()
    logits = network(x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient


@pytest.mark.parametrize("build", N_SITES, ids=lambda build: build.__name__)
def test_logits_and_gradients_are_those_of_robustbench(build: Callable[[], nn.Module]) -> None:
    theirs = published(build, 0.2)
    ours = with_ours(copy.deepcopy(theirs))
    assert len(ours.sites) == N_SITES[build]
    assert all(isinstance(ours.at(site), MeanSparse) for site in ours.sites)
    for mine, reference in zip(logits_and_gradient(ours), logits_and_gradient(theirs), strict=True):
        assert torch.equal(mine, reference)

    def pass_through(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return args[0] + (out - args[0]).detach()

    handles = [m.register_forward_hook(pass_through) for m in theirs.modules() if hasattr(m, "threshold")]
    _, expected = logits_and_gradient(theirs)
    with backward_rule(ours, "identity"):
        logits, bpda = logits_and_gradient(ours)
    torch.testing.assert_close(bpda, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    for handle in handles:
        handle.remove()
    plain = logits_and_gradient(ours)
    assert torch.equal(plain[0], logits)
    assert not torch.allclose(plain[1], bpda, rtol=0.01)

    # another alpha, one an image, none at all
    for module in theirs.modules():
        if hasattr(module, "threshold"):
            module.threshold.fill_(0.4)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        stronger = theirs(IMAGES)
        with alpha_set(ours, 0.4):
            assert torch.equal(ours(IMAGES), stronger)
        with example_alphas_set(ours, torch.tensor([0.0, 0.4])):
            torch.testing.assert_close(ours(IMAGES)[1], stronger[1])
        for module in theirs.modules():
            if hasattr(module, "threshold"):
                module.threshold.zero_()  # type: ignore[operator, union-attr]
        off, base = theirs(IMAGES), remove(ours)
        assert torch.equal(base(IMAGES), off)
    assert not torch.equal(off, stronger)
    left = {type(module) for module in base.modules()}
    assert OperatorPlace in left
    assert MeanSparse not in left
    assert not [key for key in base.state_dict() if "meansparse" in key or "threshold" in key]


def test_a_base_is_calibrated_at_the_same_sites() -> None:
    theirs = published(ra_wrn, 0.1)
    before = {k: v.clone() for k, v in theirs.state_dict().items() if k.endswith(("running_mean", "running_var"))}
    torch.manual_seed(3)
    ra_wrn()  # what published() drew before its images
    images = torch.rand(8, 3, 32, 32)
    base = take_out(theirs)
    sites = find_published_operators(base, images)
    data = torch.utils.data.TensorDataset(images, torch.zeros(8, dtype=torch.long))
    subset: Any = torch.utils.data.Subset(data, range(8))
    statistics = calibrate_channels(base, sites, subset, batch_size=8, estimator="published")
    for site, found in zip(sites, statistics, strict=True):
        torch.testing.assert_close(found.mean.float(), before[f"{site.path}.running_mean"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.std.square().float(), before[f"{site.path}.running_var"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "plain"),
    [(wrn_94, plain_wrn), (wrn_70, plain_wrn), (ra_wrn, plain_ra_wrn), (convnext, plain_convnext), (swin, plain_swin)],
)
def test_without_operators_the_architecture_is_the_bases(
    build: Callable[[], nn.Module], plain: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(1)
    network = take_out(build()).eval()
    base = plain().eval()
    base.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(network(IMAGES), base(IMAGES))


@pytest.mark.parametrize(
    "model",
    [m for m in PUBLISHED_FILES if m.n_sites not in (143, 67, 75)],
    ids=lambda m: f"{m.name}-{m.dataset}-{m.threat}",
)
def test_site_counts_of_the_published_models(model: PublishedFile) -> None:
    """On the real architectures, without memory for their weights: shapes are all it takes."""
    base = ZooEntry(model.base, model.dataset, model.threat)
    entry = published_architecture(base)
    assert entry == ZooEntry(str(model.entry), model.dataset, model.threat)
    with on_meta():
        network, plain = take_out(build_zoo_model(entry)), build_zoo_model(base)
        size = 224 if model.dataset == "imagenet" else 32
        sites = find_published_operators(network, torch.rand(1, 3, size, size))
    assert len(sites) == model.n_sites
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    after_last = {"Swin-L": (49, 1536), "ConvNeXt-L": (1536, 7, 7)}.get(model.name, (model_width(model), 8, 8))
    assert sites[-1].shape == after_last


def model_width(model: PublishedFile) -> int:
    return 864 if model.name.startswith("Ra") else 1024


@contextmanager
def on_meta() -> Iterator[None]:
    """Tensors without memory, but for the few numbers that constructors read."""
    linspace = torch.linspace
    with (
        torch.device("meta"),
        mock.patch.object(torch, "linspace", lambda *a, **k: linspace(*a, **k | {"device": "cpu"})),
    ):
        yield


def test_a_model_without_published_operators_is_refused() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    assert not operator_paths(plain.state_dict()) and not find_published_operators(plain, IMAGES)
    assert operator_paths(wrn_94().state_dict()) and not operator_paths(take_out(wrn_94()).state_dict())
    with pytest.raises(SiteError, match="no published MeanSparse model"):
        published_sites(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), IMAGES, None, ())
