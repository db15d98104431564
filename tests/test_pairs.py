"""One stream of (image, alpha) pairs: each pair as if it were alone, the pool complete and the same for all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.attacks.budget import boundary_start
from meansparse_cli.attacks.problem import AttackResult, Budget, Problem
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.data.examples import Examples
from meansparse_cli.engine.grid import VariantGrid, variant_of
from meansparse_cli.operator.active import alpha_set, backward_rule
from meansparse_cli.operator.insertion import SparsifiedModel, insert
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.sites.find import find_sites

ALPHAS = (0.0, 0.3, 0.8)
BOTH = ("plain", "bpda")


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meansparse_cli.attacks.apgd.N_STEPS", 15)


class Masked(nn.Module):
    """Two sites; the operator hides part of the gradient from a plain attack."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3), nn.GELU()
        self.conv2, self.act2, self.head = nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act2(self.conv2(self.act(self.conv(x)))).mean((2, 3))) * 30


@pytest.fixture
def model() -> SparsifiedModel:
    torch.manual_seed(3)
    net = Masked().eval()
    sites = find_sites(net, torch.rand(2, 3, 8, 8))
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in (net.act, net.act2)]
    with torch.no_grad():
        net(torch.rand(64, 3, 8, 8))
    for hook in hooks:
        hook.remove()
    statistics = [(x.mean((0, 2, 3)), x.std((0, 2, 3))) for x in seen]
    return insert(net, sites, [MeanSparse(mean, std) for mean, std in statistics]).eval()


@pytest.fixture
def examples(model: SparsifiedModel) -> Examples:
    x = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    y = model(x).argmax(1)
    y[::9] = (y[::9] + 1) % 4  # some are wrong from the start
    return Examples(x, y, torch.arange(100, 124))


BUDGET = Budget("Linf", 6 / 255)


def problem_of(model: SparsifiedModel, budget: Budget = BUDGET, batch_size: int = 16) -> Problem:
    return Problem(model, budget, n_classes=4, seed=1, batch_size=batch_size)


def store_in(
    folder: Path,
    model: SparsifiedModel,
    examples: Examples,
    n: int = 24,
    *,
    block_size: int = 8,
    plain: tuple[str, ...] = ("pgd-8",),
    bpda: tuple[str, ...] = ("bpda-apgd-ce",),
) -> VariantGrid:
    return VariantGrid(
        problem_of(model),
        examples.at(torch.arange(n)),
        plain=plain,
        bpda=bpda,
        folder=folder,
        key={},
        block_size=block_size,
    )


def score_all(store: VariantGrid, alphas: tuple[float, ...] = ALPHAS) -> None:
    columns = [variant_of([a] * 2) for a in alphas]
    for b in range(len(store.blocks)):
        store.score(b, {"plain": columns, "bpda": columns})


def outcomes(store: VariantGrid, alphas: tuple[float, ...] = ALPHAS) -> dict[tuple[float, str], list[bool]]:
    return {(a, m): store.measure(variant_of([a] * 2), m).tolist() for a in alphas for m in ("plain", "bpda", "worst")}  # type: ignore[arg-type]


def test_plain_is_what_each_alpha_gives_alone(model: SparsifiedModel, examples: Examples, tmp_path: Path) -> None:
    store = store_in(tmp_path, model, examples, plain=("apgd-ce", "pgd-8"))
    score_all(store)
    n_broken = []
    for alpha in ALPHAS:
        robust = torch.ones(24, dtype=torch.bool)
        with alpha_set(model, alpha):
            for name in ("apgd-ce", "pgd-8"):
                result = run_attack(name, problem_of(model, batch_size=24), examples)
                robust &= ~result.broken
        assert torch.equal(store.measure(variant_of([alpha] * 2), "plain"), robust)
        n_broken.append(int((~robust).sum()))
    assert min(n_broken) > 3, "else this shows nothing"
    assert len(set(n_broken)) > 1, "else the alphas may have been ignored"


def test_a_bpda_pair_has_the_trajectory_it_has_alone(
    model: SparsifiedModel, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_of_the_twin(image: Tensor, generator: torch.Generator, budget: Any) -> Tensor:
        return boundary_start(image, torch.Generator().manual_seed(5), budget)

    monkeypatch.setattr("meansparse_cli.attacks.apgd.boundary_start", start_of_the_twin)
    x, y = examples.x, examples.y
    right = (model(x).argmax(1) == y).nonzero().flatten()[:12]
    alphas = torch.tensor([[0.5, 0.2], [0.0, 0.9], [0.3, 0.3], [0.0, 0.0]]).repeat(3, 1)
    keep = torch.tensor(
        [bool(_alone(model, x[i : i + 1], a).argmax(1) == y[i]) for i, a in zip(right, alphas, strict=True)]
    )
    right, alphas = right[keep], alphas[keep]
    together = run_attack("bpda-apgd-ce", problem_of(model), examples.at(right), alphas)
    for k, i in enumerate(right.tolist()):
        one = examples.at(torch.tensor([i]))
        alone = run_attack("bpda-apgd-ce", problem_of(model), one, alphas[[k]])
        assert bool(alone.broken) == bool(together.broken[k])
        if alone.broken:
            assert torch.allclose(together.adversarial[k], alone.adversarial[0], atol=1e-6)
        # and as the whole model at these alphas, straight through
        with alpha_set(model, alphas[k]), backward_rule(model, "identity"):
            whole = run_attack("apgd-ce", problem_of(model, batch_size=1), one)
        assert bool(whole.broken) == bool(alone.broken)
    assert int(together.broken.sum()) > 0


def _alone(model: SparsifiedModel, image: Tensor, alphas: Tensor) -> Tensor:
    with alpha_set(model, alphas), torch.no_grad():
        return model(image)


def test_every_pair_has_seen_the_complete_pool_of_its_image(
    model: SparsifiedModel, examples: Examples, tmp_path: Path
) -> None:
    store = store_in(tmp_path, model, examples)
    score_all(store)
    for b, positions in enumerate(store.blocks):
        block = store._load(b)
        assert len(block.pool_rows)
        for alpha in ALPHAS:
            column = variant_of([alpha] * 2)
            worst, bpda = (store.measure(column, m)[positions] for m in ("worst", "bpda"))
            with alpha_set(model, alpha), torch.no_grad():
                fooled = model(block.pool_images).argmax(1) != examples.y[positions][block.pool_rows]
            assert not worst[block.pool_rows[fooled]].any(), "an image of the pool breaks a pair that counts as robust"
            assert not bpda[block.pool_rows[fooled & block.pool_bpda]].any()
            assert not (worst & ~bpda).any()


def test_an_image_found_on_the_base_counts_at_another_alpha_where_it_breaks(
    model: SparsifiedModel, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_the_base(name: str, problem: Problem, pairs: Examples, alphas: Tensor, **rest: Any) -> AttackResult:
        """The attack, blind at every alpha but 0."""
        result = run_attack(name, problem, pairs, alphas, **rest)
        return replace(result, broken=result.broken & (alphas == 0).all(1))

    monkeypatch.setattr("meansparse_cli.engine.grid.run_attack", only_the_base)
    store, column = store_in(tmp_path, model, examples, plain=("apgd-ce",)), variant_of([0.3, 0.3])
    score_all(store)
    broken_on_base = ~store.measure(store.base, "plain") & store.clean(store.base)
    assert torch.equal(store.measure(column, "plain"), store.clean(column)), "plain is the alpha's own attack alone"
    expected = store.clean(column)
    for b, positions in enumerate(store.blocks):
        block = store._load(b)
        with alpha_set(model, 0.3), torch.no_grad():
            fooled = model(block.pool_images).argmax(1) != examples.y[positions][block.pool_rows]
        assert set(positions[block.pool_rows].tolist()) == set(positions[broken_on_base[positions]].tolist())
        expected[positions[block.pool_rows[fooled]]] = False
    assert torch.equal(store.measure(column, "bpda"), expected)
    assert torch.equal(store.measure(column, "worst"), expected)
    assert int((store.clean(column) & ~expected).sum()) > 0


def test_the_order_and_the_company_of_alphas_make_no_difference(
    model: SparsifiedModel, examples: Examples, tmp_path: Path
) -> None:
    first = store_in(tmp_path / "a", model, examples)
    score_all(first)
    second = store_in(tmp_path / "b", model, examples, block_size=24)
    for alphas in ((0.8,), (0.0,), (0.3,)):  # one alpha at a time, in another order, in one block
        score_all(second, alphas)
    for key, mask in outcomes(first).items():
        if key[1] == "plain":
            assert outcomes(second)[key] == mask
    # the pools need not hold the same images, but the base faces no weaker adversary than the alpha scored last
    for b in range(len(second.blocks)):
        block = second._load(b)
        assert {o.n_tried for o in block.variants.values()} == {len(block.pool_rows)}


def test_the_base_faces_as_many_starts_as_any_alpha(model: SparsifiedModel, examples: Examples) -> None:
    right = examples.at(model(examples.x).argmax(1) == examples.y)
    at_zero, wide = torch.zeros(len(right), 2), problem_of(model, Budget("Linf", 3 * BUDGET.eps))
    plain, twin = (run_attack(name, wide, right, at_zero) for name in ("apgd-ce", "bpda-apgd-ce"))
    both = plain.broken & twin.broken
    assert int(both.sum()) > 3
    ours, theirs = plain.adversarial[both], twin.adversarial[both]
    assert not any(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "one trajectory, run twice"


def test_more_images_and_more_alphas_add_to_what_is_there(
    model: SparsifiedModel, examples: Examples, tmp_path: Path
) -> None:
    score_all(store_in(tmp_path, model, examples, 12), (0.0, 0.3))
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.pt")}
    more = store_in(tmp_path, model, examples)
    assert [len(block) for block in more.blocks] == [8, 4, 8, 4]
    assert more.count_missing(0, {"plain": [more.base], "bpda": [more.base]}) == 0
    score_all(more, (0.0, 0.3))
    assert {f: f.stat().st_mtime_ns for f in files} == files, "nothing was done again"
    whole = store_in(tmp_path / "whole", model, examples)
    score_all(whole, (0.0, 0.3))
    assert outcomes(more, (0.0, 0.3)) == outcomes(whole, (0.0, 0.3))
    score_all(more)
    assert len(more.measure(variant_of([0.8, 0.8]), "worst")) == 24


def test_a_damaged_block_is_named_and_done_again_alone(
    model: SparsifiedModel, examples: Examples, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = store_in(tmp_path, model, examples)
    score_all(whole)
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("block-*.pt")}
    damaged = next(file for file in files if file.name.startswith("block-000008"))
    damaged.write_bytes(damaged.read_bytes()[:-40])
    again = store_in(tmp_path, model, examples)
    assert "block-000008-8.pt is damaged" in caplog.text
    wanted = {"plain": [again.base], "bpda": [again.base]}
    assert [again.count_missing(b, wanted) for b in range(3)] == [0, 16, 0]
    score_all(again)
    assert outcomes(again) == outcomes(whole)
    assert [f for f in files if f.stat().st_mtime_ns != files[f]] == [damaged]


def test_other_images_or_settings_are_not_mistaken_for_these(
    model: SparsifiedModel, examples: Examples, tmp_path: Path
) -> None:
    score_all(store_in(tmp_path, model, examples), (0.0,))
    other = store_in(tmp_path, model, examples.at(torch.arange(24).flip(0)))
    assert other.count_missing(0, {"plain": [other.base]}) == 8
    assert store_in(tmp_path, model, examples, bpda=("bpda-apgd-dlr",)).count_missing(0, {"plain": [other.base]}) == 8


@pytest.mark.parametrize("name", ["square", "fab-t", "adaptive-1-1", "soft-0.05-apgd-margin-near1-10"])
def test_other_attacks_break_a_pair_as_they_would_alone(
    name: str, model: SparsifiedModel, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their batches carry the alphas of each row along."""
    monkeypatch.setattr("meansparse_cli.attacks.square.N_QUERIES", 60)
    wide = Budget("Linf", 6 * BUDGET.eps)
    x, y = examples.x, examples.y
    alphas = torch.tensor([[0.0, 0.0], [0.1, 0.4]] * 10)
    right = (model(x).argmax(1) == y).nonzero().flatten()[:20]
    keep = torch.tensor(
        [
            bool(_alone(model, x[i : i + 1], a).argmax(1) == y[i])
            for i, a in zip(right, alphas[: len(right)], strict=True)
        ]
    )
    alphas = alphas[: len(right)]
    right, alphas = right[keep], alphas[keep]
    result = run_attack(name, problem_of(model, wide), examples.at(right), alphas)
    for k, i in enumerate(right.tolist()):
        with alpha_set(model, alphas[k]):
            alone = run_attack(name, problem_of(model, wide, batch_size=1), examples.at(torch.tensor([i])))
        assert bool(alone.broken) == bool(result.broken[k])
        if alone.broken:
            assert torch.allclose(result.adversarial[k], alone.adversarial[0], atol=1e-5)
    assert int(result.broken.sum()) > 0
    assert all(float(operator.alpha) == 0 for operator in model.modules() if isinstance(operator, MeanSparse))


def test_a_pair_that_is_wrong_at_its_clean_image_is_broken_as_it_is(model: SparsifiedModel, examples: Examples) -> None:
    alphas = torch.tensor([[0.0, 0.0], [0.9, 0.9]]).repeat_interleave(24, dim=0)
    pairs, told = examples.at(torch.arange(24).repeat(2)), list[int]()
    result = run_attack("apgd-ce", problem_of(model), pairs, alphas, on_progress=told.append)
    wrong = torch.cat([_alone(model, examples.x, row).argmax(1) != examples.y for row in alphas[[0, -1]]])
    assert wrong[:24].any() and wrong[24:].any() and not wrong.all()
    assert result.broken[wrong].all() and torch.equal(result.adversarial[wrong], pairs.x[wrong])
    assert (result.passes[wrong] == torch.tensor([1, 0])).all() and (result.passes[~wrong, 0] > 2).all()
    assert sum(told) == 48


@pytest.mark.parametrize("name", ["apgd-ce", "adaptive-1-1"])
def test_another_form_of_the_model_is_searched_variant_by_variant(
    name: str, model: SparsifiedModel, examples: Examples
) -> None:
    shown: list[float] = []

    class Form(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            shown.append(float(model.at(model.sites[0]).alpha))
            return self.model(x)

    alphas = torch.tensor([[0.3, 0.3], [0.0, 0.0], [0.3, 0.0]]).repeat(8, 1)
    mixed = run_attack(name, problem_of(model), examples, alphas)
    apart = run_attack(name, replace(problem_of(model), search_model=Form()), examples, alphas)
    assert torch.equal(apart.broken, mixed.broken) and 0 < int(mixed.broken.sum()) < 24
    assert torch.allclose(apart.adversarial, mixed.adversarial, atol=1e-5)
    assert {round(alpha, 6) for alpha in shown} == ({0.0, 0.3} if name == "apgd-ce" else set())  # adaptive puts hooks
