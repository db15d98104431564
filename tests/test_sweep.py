"""A whole sweep on stored outcomes whose answer is known, and the search for more than one alpha."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from meansparse_cli.attacks import PRESETS, expand_attacks
from meansparse_cli.engine.grid import Variant, VariantGrid
from meansparse_cli.errors import ConfigError
from meansparse_cli.ledger import Ledger
from meansparse_cli.operator.checkpoint import Checkpoint, centred, load_checkpoint, save_checkpoint, sparsify
from meansparse_cli.operator.statistics import ChannelStatistics
from meansparse_cli.selection.choice import ChoiceRule
from meansparse_cli.selection.rules import alphas_by_rule, with_site_alphas
from meansparse_cli.selection.search import candidates_of, check_blocks, depth_groups, search_alphas, site_groups
from meansparse_cli.selection.sweep import SweepSettings, families_of, grid_of, sweep_alphas
from meansparse_cli.sites.find import Site, find_sites

N, BLOCK = 400, 50


class KnownPairs(VariantGrid):
    """A store whose attacks are a function: (column, family) -> (n,) bool, still right."""

    def __init__(self, folder: Path, n_sites: int, robust: Callable[[Variant, str], Tensor]) -> None:
        self.robust_at, self.n_sites = robust, n_sites
        self.ledger = Ledger(folder, {}, on_change="beside")
        self.cells: Any = SimpleNamespace(model=SimpleNamespace(sites=[None] * n_sites))
        self.attacks = {"plain": ("apgd-ce",), "bpda": ("bpda-apgd-ce",)}
        self.ids = torch.arange(N)
        self.blocks = list(torch.arange(N).split(BLOCK))
        self.asked: set[tuple[int, Variant, str]] = set()

    def is_scored(self, b: int, column: Variant, family: Any) -> bool:
        return (b, column, family) in self.asked

    def count_missing(self, b: int, wanted: Any) -> int:
        return sum((b, c, family) not in self.asked for family, columns in wanted.items() for c in columns)

    def classify(self, columns: Sequence[Variant]) -> None:
        pass

    def score(self, b: int, wanted: Any, what: str = "") -> None:
        self.asked |= {(b, c, family) for family, columns in wanted.items() for c in columns}

    def clean(self, column: Variant, blocks: Any = None) -> Tensor:
        positions = torch.cat([self.blocks[b] for b in (range(len(self.blocks)) if blocks is None else blocks)])
        return positions % 100 >= 20 + 10 * max(column)  # two points lost for every 0.2

    def measure(self, column: Variant, name: Any, blocks: Any = None) -> Tensor:
        parts = [torch.zeros(0, dtype=torch.bool)]
        for b in range(len(self.blocks)) if blocks is None else blocks:
            families = {"worst": ("plain", "bpda"), "bpda": ("bpda",)}.get(name, ("plain",))
            if not all(self.is_scored(b, column, family) for family in families):
                break
            positions = self.blocks[b]
            plain, bpda = self.robust_at(column, "plain")[positions], self.robust_at(column, "bpda")[positions]
            parts.append({"plain": plain, "apgd-ce": plain, "bpda": bpda, "worst": plain & bpda}[name])
        return torch.cat(parts)

    def n_pairs(self) -> int:
        return len(self.asked) * BLOCK


def masking(column: Variant, family: str) -> Tensor:
    """Plain gains up to alpha = 0.3 and falls from there; BPDA loses from the start."""
    alpha, where = max(column), torch.arange(N) % 100
    gain = 20 * alpha - 60 * max(0.0, alpha - 0.3) if family == "plain" else -10 * alpha
    return (where * 37) % 100 < 40 + round(gain)


GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)


def settings(objective: str = "apgd-ce", **changes: Any) -> SweepSettings:
    rule = ChoiceRule(objective, max_clean_drop=0.05, attacks=("apgd-ce",))
    return SweepSettings(**{"alphas": GRID, "rule": rule, "site_weights": (1.0,), **changes})


@pytest.mark.parametrize("racing", [False, True])
def test_both_choices_are_made_and_scored_in_full(tmp_path: Path, racing: bool) -> None:
    store = KnownPairs(tmp_path, 1, masking)
    sweep = sweep_alphas(store, settings(racing=racing))
    assert (sweep.paper.alpha, sweep.worst.alpha, sweep.chosen.alpha) == (0.3, 0.0, 0.3)
    assert sweep.paper.gain == pytest.approx(0.06)
    assert sweep.paper.is_clear
    for alpha in (0.0, 0.3):
        assert all(len(sweep.at(alpha).measure(curve)) == N for curve in ("plain", "bpda", "worst"))  # type: ignore[arg-type]
    report = sweep.to_report()
    assert report["under_bpda"]["verdict"] == "gradient masking"
    assert [row["alpha"] for row in report["curve"]] == list(GRID)
    everything = 2 * len(GRID) * N
    assert store.n_pairs() < 0.8 * everything if racing else store.n_pairs() == everything
    n_scored = {row["alpha"]: row["worst"]["n_examples"] for row in report["curve"]}
    assert n_scored[0.6] == (BLOCK if racing else N), "it breaks the clean constraint: one block, for the curve"
    assert (report["racing"]["worst"] != []) == racing
    assert n_scored[0.0] == N


def test_the_objective_decides_what_the_checkpoint_carries(tmp_path: Path) -> None:
    sweep = sweep_alphas(KnownPairs(tmp_path, 1, masking), settings("worst"))
    assert (sweep.chosen.alpha, sweep.paper.alpha) == (0.0, 0.3)
    assert sweep.to_report()["under_bpda"] is None
    assert sweep.paper.rule.objective == "apgd-ce"
    bpda = sweep_alphas(KnownPairs(tmp_path / "b", 1, masking), settings("bpda"))
    assert (bpda.chosen.alpha, bpda.chosen.rule.curve) == (0.0, "bpda")


def test_refining_adds_the_alphas_beside_the_best_one(tmp_path: Path) -> None:
    sweep = sweep_alphas(KnownPairs(tmp_path, 1, masking), settings(n_refine=1))
    assert [p.alpha for p in sweep.points] == [0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.6]
    twice = sweep_alphas(KnownPairs(tmp_path / "b", 1, masking), settings(n_refine=2))
    assert 0.275 in [p.alpha for p in twice.points]


def test_grids() -> None:
    assert grid_of([0.3, 0.1, 0.1]) == ((0.0, 0.1, 0.3), "repeats were dropped, sorted, 0 was added as the baseline")
    assert grid_of([0.0, 0.1]) == ((0.0, 0.1), "")
    with pytest.raises(ConfigError, match="no alpha above 0"):
        grid_of([0.0])


def test_apgd_ce_is_first_wherever_the_papers_choice_is_made_on_it() -> None:
    """What another attack broke before it, it would not be shown, and its curve would count that as robust."""
    for objective in ("apgd-ce", "apgd", "bpda", "worst"):
        for wanted in (["apgd", "pgd-50"], ["full"], ["apgd-dlr", "apgd-ce"]):
            assert families_of(wanted, objective)[0][0] == "apgd-ce"


def test_families() -> None:
    surrogate = tuple(expand_attacks(["surrogate"]))
    assert families_of((), "worst") == (("apgd-ce",), surrogate)  # without a twin: the set breaks more
    assert families_of(("apgd", "surrogate"), "") == (("apgd-ce", "apgd-dlr"), surrogate)
    assert set(PRESETS["fast"]) == {"apgd-margin-30", *surrogate}
    assert families_of(("pgd-50",), "") == (("pgd-50",), ("bpda-apgd-ce",))
    assert families_of(("bpda-apgd-t",), "bpda") == (("apgd-ce",), ("bpda-apgd-ce", "bpda-apgd-t"))
    with pytest.raises(ConfigError, match="needs apgd-dlr, which --attack leaves out"):
        families_of(("apgd-ce",), "apgd")


def late_sites_help(column: Variant, family: str) -> Tensor:
    """The third of three sites gains with its alpha, wherever attacked; the others lose; one example is noise."""
    gain = round(30 * column[2] - 20 * column[0] - 20 * column[1])
    return (torch.arange(N) * 37) % 100 < 40 + gain


def test_the_search_finds_the_sites_that_help_and_leaves_the_others_off(tmp_path: Path) -> None:
    store = KnownPairs(tmp_path, 3, late_sites_help)
    groups = {"a": [0], "b": [1], "c": [2]}
    rule = ChoiceRule("worst", max_clean_drop=0.10)
    found = search_alphas(store, groups, start=(0.0, 0.0, 0.0), candidates=[0.0, 0.2, 0.4], rule=rule)
    assert found.variant == (0.0, 0.0, 0.4)
    assert [step.is_accepted for step in found.steps] == [True, False, False]
    tight = ChoiceRule("worst", max_clean_drop=0.03)
    store = KnownPairs(tmp_path, 3, late_sites_help)
    assert search_alphas(store, groups, start=(0.0,) * 3, candidates=[0.0, 0.2, 0.4], rule=tight).variant == (
        0.0,
        0.0,
        0.2,
    )


def lucky_on(*parts: int) -> Callable[[Variant, str], Tensor]:
    """A gain on every third block alone, beginning with those of ``parts``."""

    def robust(column: Variant, family: str) -> Tensor:
        there = sum((torch.arange(N) // BLOCK) % 3 == part for part in parts) > 0
        return ((torch.arange(N) * 37) % 100 < 40) | (there & (column[0] > 0) & (torch.arange(N) % 5 == 0))

    return robust


def test_a_gain_on_one_part_alone_is_not_accepted(tmp_path: Path) -> None:
    lucky = lucky_on(0)

    found = search_alphas(
        KnownPairs(tmp_path, 1, lucky), {"a": [0]}, start=(0.0,), candidates=[0.0, 0.3], rule=ChoiceRule("worst", 0.05)
    )
    assert found.variant == (0.0,)
    assert found.steps[0].gain > 0.1 and found.steps[0].confirmed_gain == 0


def test_a_search_needs_images_to_be_judged_on() -> None:
    check_blocks(192, 64)
    for n, unseen, smaller in ((30, 0, None), (128, 0, 8), (143, 15, 16)):
        with pytest.raises(ConfigError, match=f"{unseen} images of {n} in blocks of 64") as refusal:
            check_blocks(n, 64)
        assert "--n-examples to 168" in str(refusal.value.hint)
        assert ("--block-size" in str(refusal.value.hint)) == (smaller is not None)
        if smaller is not None:
            assert f"--block-size {smaller} " in str(refusal.value.hint)
            check_blocks(n, smaller)
    check_blocks(168, 64)  # what the hint says is enough, and no more than that
    with pytest.raises(ConfigError):
        check_blocks(167, 64)


def one_helps_one_hurts(*parts: int) -> Callable[[Variant, str], Tensor]:
    """The first of two sites gains as in ``lucky_on``; the second loses half of the robust: no shared alpha pays."""
    lucky = lucky_on(*parts)

    def robust(column: Variant, family: str) -> Tensor:
        return lucky(column, family) & ((column[1] == 0) | (torch.arange(N) % 2 == 0))

    return robust


@pytest.mark.parametrize(("parts", "is_carried"), [((0, 1), False), ((0, 1, 2), True), ((2,), False)])
def test_what_a_search_found_is_judged_on_images_that_it_did_not_look_at(
    tmp_path: Path, parts: tuple[int, ...], is_carried: bool
) -> None:
    store = KnownPairs(tmp_path, 2, one_helps_one_hurts(*parts))
    store.cells.model.sites = [site(i, (8, 4, 4)) for i in range(2)]
    grid = settings("worst", alphas=(0.0, 0.3), rule=ChoiceRule("worst", 0.05), racing=False, site_weights=(1.0, 1.0))
    sweep = sweep_alphas(store, grid)
    assert sweep.chosen.alpha == 0
    checkpoint = FakeCheckpoint(sites=tuple(store.cells.model.sites), active=tuple(store.cells.model.sites))
    _, carried, report = alphas_by_rule("per-site", store, grid, sweep, checkpoint)
    found = report["search"]
    assert [step["is_accepted"] for step in found["steps"]] == [False, parts != (2,)]
    assert found["unseen"]["n_examples"] == found["unseen"]["point"]["worst"]["n_examples"] == 100
    assert found["unseen"]["minus_base"] == pytest.approx(0.12 if is_carried else 0.0)
    assert found["is_carried"] == is_carried
    assert (carried.alpha, carried.site_weights) == ((0.3, (1.0, 0.0)) if is_carried else (0.0, None))


@dataclass(frozen=True)
class FakeCheckpoint:
    alpha: float = 0.0
    site_weights: tuple[float, ...] | None = None
    sites: tuple[Site, ...] = ()
    active: tuple[Site, ...] = ()


class FillingPools(KnownPairs):
    """Every pair that is scored adds an image to a pool which breaks another example everywhere: masks shrink."""

    stop_after: int | None = None

    def score(self, b: int, wanted: Any, what: str = "") -> None:
        new = {(b, c, family) for family, columns in wanted.items() for c in columns} - self.asked
        if new and self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise KeyboardInterrupt
        super().score(b, wanted)

    def measure(self, column: Variant, name: Any, blocks: Any = None) -> Tensor:
        mask = super().measure(column, name, blocks)
        if name in ("plain", "apgd-ce") or not len(mask):
            return mask
        positions = torch.cat([self.blocks[b] for b in (range(len(self.blocks)) if blocks is None else blocks)])[
            : len(mask)
        ]
        n_pool = sum(a != (0.0,) * self.n_sites for _, a, family in self.asked if family == "bpda")
        return mask & ((positions * 7919 + round(10 * sum(column))) % 251 >= n_pool % 60)


def test_a_search_that_is_killed_decides_the_same(tmp_path: Path) -> None:
    groups, rule = {f"s{i}": [i] for i in range(4)}, ChoiceRule("worst", 0.5)

    def late(column: Variant, family: str) -> Tensor:
        return (torch.arange(N) * 37) % 100 < 40 + round(8 * column[3] + 6 * column[2] - 5 * column[0])

    def search(store: FillingPools) -> Any:
        found = search_alphas(store, groups, start=(0.0,) * 4, candidates=[0.0, 0.2, 0.4], rule=rule)
        return found.variant, [vars(step) for step in found.steps]

    whole = search(FillingPools(tmp_path / "whole", 4, late))
    n_kills = n_differ = 0
    for stop_after in range(100):
        killed = FillingPools(tmp_path / f"killed-{stop_after}", 4, late)
        killed.stop_after = stop_after
        try:
            assert search(killed) == whole
            break
        except KeyboardInterrupt:
            killed.stop_after, n_kills = None, n_kills + 1
        asked = set(killed.asked)
        assert search(killed) == whole
        killed.asked = asked
        for file in killed.ledger.folder.glob("search-*.json"):
            file.unlink()
        n_differ += search(killed) != whole
    assert n_kills > 10
    assert n_differ > 0, "without its journal a resumed search decides on fuller pools"


def site(index: int, shape: tuple[int, ...], axis: int = 1) -> Site:
    channels = shape[axis - 1] if axis > 0 else shape[axis]
    return Site(index, f"s{index}", f"s{index}", "module", "ReLU", "channels-first", axis, channels, shape, False)


def test_groups_by_depth_are_stages_or_quarters() -> None:
    shapes = [(8, 32, 32), (16, 32, 32), (16, 16, 16), (32, 16, 16), (64, 8, 8)]
    assert list(depth_groups([site(i, s) for i, s in enumerate(shapes)]).values()) == [[0, 1], [2, 3], [4]]
    tokens = [site(i, (49, 96 if i % 2 else 384), axis=2) for i in range(10)]
    assert [len(group) for group in depth_groups(tokens).values()] == [2, 3, 2, 3]
    assert site_groups(tokens[:2]) == {"s0": [0], "s1": [1]}
    assert candidates_of((0.0, 0.1)) == [0.0, 0.1]


@pytest.fixture
def checkpoint(network: torch.nn.Module, images: Tensor) -> Checkpoint:
    sites = tuple(find_sites(network, images))
    rng = torch.Generator().manual_seed(0)
    statistics = tuple(
        ChannelStatistics(
            9,
            torch.randn(s.channels, generator=rng, dtype=torch.float64) / 4,
            torch.rand(s.channels, generator=rng, dtype=torch.float64),
        )
        for s in sites
    )
    return Checkpoint(sites, statistics, "pooled")


def test_an_alpha_for_each_site_survives_the_file(
    network: torch.nn.Module, images: Tensor, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    import copy

    from meansparse_cli.operator.active import alpha_set

    n = len(checkpoint.sites)
    column = tuple([0.0, 0.4, 0.1] + [0.0] * (n - 3))
    carried = with_site_alphas(checkpoint, column)
    save_checkpoint(tmp_path / "c.safetensors", carried)
    loaded = load_checkpoint(tmp_path / "c.safetensors")
    assert (loaded.alpha, loaded.site_weights) == (0.4, (0.0, 1.0, 0.25, *[0.0] * (n - 3)))
    model = sparsify(copy.deepcopy(network), loaded)
    assert len(model.sites) == 2, "a site of weight 0 has no operator"
    whole = sparsify(copy.deepcopy(network), checkpoint)
    with alpha_set(whole, torch.tensor(column)):
        assert torch.allclose(model(images), whole(images), atol=1e-6)
    assert not torch.allclose(model(images), network(images))
    assert torch.equal(sparsify(copy.deepcopy(network), loaded, alpha=0.0)(images), network(images))
    assert with_site_alphas(checkpoint, (0.0,) * n).alpha == 0


def test_a_plain_checkpoint_is_byte_for_byte_what_it_was(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.safetensors", checkpoint)
    assert b"site_weights" not in (tmp_path / "c.safetensors").read_bytes()
    assert b"centre" not in (tmp_path / "c.safetensors").read_bytes()
    assert checkpoint.options_id() == ""


def test_centre_and_spread() -> None:
    statistics = ChannelStatistics(4, torch.tensor([1.0, 3.0]).double(), torch.tensor([1.0, 2.0]).double())
    assert [t.tolist() for t in centred(statistics)] == [[1, 3], [1, 2]]
    assert [t.tolist() for t in centred(statistics, "zero")] == [[0, 0], [1, 2]]
    assert [t.tolist() for t in centred(statistics, "global-mean")] == [[2, 2], [1, 2]]
    values = torch.tensor([[0.0, 2.0], [1.0, 5.0]])  # two channels of these means and standard deviations
    assert centred(statistics, spread="site-std")[1].tolist() == pytest.approx([float(values.std(correction=0))] * 2)


@pytest.mark.parametrize("weights", [(1.0,), (2.0, *[1.0] * 9), (0.0,) * 10])
def test_weights_that_cannot_be_are_refused(weights: tuple[float, ...], checkpoint: Checkpoint) -> None:
    from dataclasses import replace

    n = len(checkpoint.sites)
    with pytest.raises(ConfigError, match="site weights"):
        replace(checkpoint, site_weights=weights[:n] if len(weights) > 1 else weights * (n + 1))
    with pytest.raises(ConfigError, match="median"):
        replace(checkpoint, centre="median")  # type: ignore[arg-type]
