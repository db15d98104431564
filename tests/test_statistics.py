from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Subset

from meansparse_cli.data.read import ArrayImages
from meansparse_cli.errors import StatisticsError
from meansparse_cli.operator import calibration, statistics
from meansparse_cli.operator.calibration import calibrate_channels
from meansparse_cli.operator.statistics import ChannelSums, compute, empty, merge
from meansparse_cli.sites.find import find_sites
from tests.conftest import added


def fold(parts: list[Tensor], axis: int = 1) -> ChannelSums:
    state = empty(parts[0].shape[axis])
    for part in parts:
        state = added(state, part, axis)
    return state


def test_uneven_batches_equal_numpy_over_everything() -> None:
    x = torch.randn(23, 4, 5, 3) * torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1) + 7
    result = compute(fold(list(x.split([1, 9, 2, 11]))))
    values = x.double().numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    np.testing.assert_allclose(result.mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(result.std, values.std(1), rtol=1e-12)
    assert result.count == 23 * 15


def test_order_and_merging_do_not_matter() -> None:
    parts = list(torch.randn(30, 3, 4).split([7, 1, 22]))
    forwards, backwards = fold(parts, 2), fold(parts[::-1], 2)
    split = merge(fold(parts[:2], 2), fold(parts[2:], 2))
    for other in (backwards, split):
        assert torch.allclose(forwards.mean, other.mean, rtol=1e-13, atol=1e-15)
        assert torch.allclose(forwards.spread, other.spread, rtol=1e-13)


def test_large_offset_and_constant_channel() -> None:
    x = torch.stack([torch.randn(1000) + 1e4, torch.full((1000,), 0.1)], 1)
    result = compute(fold(list(x.split(13))))
    np.testing.assert_allclose(result.std[0], x[:, 0].double().numpy().std(), rtol=1e-9)
    assert float(result.std[1]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last", "tokens", "flat"])
def test_every_layout_and_precision_gives_what_float64_gives(
    dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "IN_CACHE", 100)  # several pieces, within a row too
    x = (torch.randn(6, 5, 9, 11) * 1.3 + torch.arange(5).view(1, 5, 1, 1) * 10).to(dtype)
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    x, axis = {"tokens": (x.flatten(2).transpose(1, 2), -1), "flat": (x[:, :, 0, 0], 1)}.get(layout, (x, 1))
    before = x.clone()
    result = compute(fold(list(x.split([2, 4])), axis))
    values = x.movedim(axis, 0).flatten(1).double()
    np.testing.assert_allclose(result.mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(result.std, values.std(1, correction=0), rtol=1e-12)
    assert torch.equal(x, before)


def test_a_mean_far_above_the_deviation_costs_no_digits() -> None:
    x = torch.randn(64, 3, 32, 32) + 1e4
    result = compute(fold(list(x.split(16))))
    values = x.double().movedim(1, 0).flatten(1)
    std = values.std(1, correction=0)
    assert float(((result.mean - values.mean(1)).abs() / std).max()) < 1e-9
    assert float(((result.std - std).abs() / std).max()) < 1e-9


def test_published_estimator_is_the_average_over_batches() -> None:
    parts = list(torch.randn(25, 3, 4, 4).cumsum(0).split([10, 10, 5]))
    state = empty(3, "published")
    for part in parts:
        state = added(state, part, 1)
    result = compute(state)
    means = np.stack([p.double().numpy().mean((0, 2, 3)) for p in parts])
    variances = np.stack([p.double().numpy().var((0, 2, 3), ddof=1) for p in parts])
    np.testing.assert_allclose(result.mean, means.mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.std, np.sqrt(variances.mean(0)), rtol=1e-12)


@pytest.mark.parametrize("estimator", ["pooled", "published"])
def test_where_memory_ends_the_batch_is_cut_unless_the_estimator_depends_on_it(estimator: Any) -> None:
    class Small(nn.Sequential):
        n_refused, fits = 0, 64

        def forward(self, x: Tensor) -> Tensor:
            x = self[1](self[0](x))
            if len(x) > self.fits:  # behind the first site, which has seen the batch
                self.n_refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self[3](self[2](x))  # type: ignore[no-any-return]

    net = Small(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU())
    images = Subset(
        ArrayImages(
            np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), np.zeros(40, int), source="images"
        ),
        range(40),
    )
    sites = find_sites(net, torch.rand(4, 3, 8, 8))
    whole = calibrate_channels(net, sites, images, batch_size=16, estimator=estimator)
    net.fits = 5
    if estimator == "published":
        with pytest.raises(torch.OutOfMemoryError):
            calibrate_channels(net, sites, images, batch_size=16, estimator=estimator)
        return
    for n_refused in (2, 2):  # 16 and 8 were too many, once
        cut = calibrate_channels(net, sites, images, batch_size=16)
        assert net.n_refused == n_refused
        for one, other in zip(whole, cut, strict=True):
            assert one.count == other.count
            np.testing.assert_allclose(one.mean, other.mean, rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(one.std, other.std, rtol=1e-12)


def test_a_site_without_data_nan_and_changed_channels_are_errors() -> None:
    with pytest.raises(StatisticsError, match="stem saw no data"):
        compute(empty(3), "stem")
    bad = torch.randn(4, 3, 2)
    bad[0, 1, 0] = float("nan")
    with pytest.raises(StatisticsError, match="1 of 3 channels are NaN"):
        compute(fold([bad]))
    with pytest.raises(StatisticsError, match="from 3 to 5"):
        added(empty(3), torch.randn(2, 5, 2), 1)
    with pytest.raises(StatisticsError, match="cannot merge"):
        merge(empty(3), empty(3, "published"))


@pytest.fixture
def pictures() -> "Subset[tuple[Tensor, int]]":
    rng = np.random.default_rng(3)
    source = ArrayImages(rng.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8), np.arange(40) % 4, source="test")
    return Subset(source, range(40))


def test_any_batch_size_gives_the_same_statistics(network: nn.Module, pictures: "Subset[tuple[Tensor, int]]") -> None:
    sites = find_sites(network, torch.rand(2, 3, 8, 8))
    results = [calibrate_channels(network, sites, pictures, batch_size=b) for b in (1, 7, 40)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.count == b.count
            assert torch.allclose(a.mean, b.mean, rtol=0, atol=1e-6)
            assert torch.allclose(a.std, b.std, rtol=0, atol=1e-6)


def test_the_device_is_waited_for_once_a_batch(
    network: nn.Module, pictures: "Subset[tuple[Tensor, int]]", monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    together = calibration.on_cpu
    monkeypatch.setattr(calibration, "on_cpu", lambda parts: waits.append(len(parts)) or together(parts))
    sites = find_sites(network, torch.rand(2, 3, 8, 8))
    read = {}
    for batch_size, n_batches in ((40, 1), (16, 3)):
        waits.clear()
        with _Numbers() as numbers:
            calibrate_channels(network, sites, pictures, batch_size=batch_size)
        assert waits == [len(sites)] * n_batches
        read[batch_size] = numbers.read
    assert read[16] == read[40], "numbers are read at the end alone"


class _Numbers(TorchDispatchMode):
    """Counts how often a tensor is read as a number, for which a GPU has to be waited for."""

    read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_calibration_leaves_the_model_as_it_was(network: nn.Module, pictures: "Subset[tuple[Tensor, int]]") -> None:
    names = [n for n, _ in network.named_modules()]
    network.train()
    calibrate_channels(network, find_sites(network, torch.rand(2, 3, 8, 8)), pictures, batch_size=16)
    assert network.training
    assert [n for n, _ in network.named_modules()] == names
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_statistics_are_those_of_the_activation_inputs(pictures: "Subset[tuple[Tensor, int]]") -> None:
    conv = nn.Conv2d(3, 5, 3)
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)).eval()
    (statistic,) = calibrate_channels(net, find_sites(net, torch.rand(2, 3, 8, 8)), pictures, batch_size=9)
    x = torch.stack([pictures[i][0] for i in range(40)])
    features = conv(x).detach().double().numpy()
    np.testing.assert_allclose(statistic.mean, features.mean((0, 2, 3)), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(statistic.std, features.std((0, 2, 3)), rtol=1e-6)
