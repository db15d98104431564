"""Our statistics and operator against RobustBench's own MeanSparse class, on the same input."""

import pytest
import torch

from meansparse_cli.models import zoo
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.operator.statistics import compute, empty
from tests.conftest import added


@pytest.fixture(scope="module")
def theirs() -> type[torch.nn.Module]:
    zoo.zoo_entries()  # mends robustbench's import
    from robustbench.model_zoo.architectures.Meansparse_wrn_70_16 import MeanSparse as Published

    return Published  # type: ignore[no-any-return]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.35, 1.0])
def test_statistics_and_operator_agree(theirs: type[torch.nn.Module], alpha: float) -> None:
    generator = torch.Generator().manual_seed(5)
    batches = [2 * torch.randn(16, 6, 5, 5, generator=generator) + 1 for _ in range(4)]
    published = theirs(6)
    published.flag_update_statistics.fill_(1)
    published.batch_num.fill_(len(batches))
    sums = empty(6, "published")
    for batch in batches:
        published(batch)
        sums = added(sums, batch, 1)
    published.flag_update_statistics.fill_(0)
    statistics = compute(sums)
    torch.testing.assert_close(statistics.mean.float(), published.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.std.float().square(), published.running_var, rtol=1e-5, atol=1e-6)

    published.threshold.fill_(alpha)
    ours = MeanSparse(published.running_mean, published.running_var.sqrt(), alpha)
    for batch in batches:
        x = batch.clone().requires_grad_()
        z = batch.clone().requires_grad_()
        mine, reference = ours(x), published(z)
        assert torch.equal(mine, reference)
        (a,), (b,) = torch.autograd.grad(mine.square().sum(), x), torch.autograd.grad(reference.square().sum(), z)
        assert torch.equal(a, b)
