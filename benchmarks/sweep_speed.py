"""The sweep against the naive loop: one pyautoattack APGD-CE run an alpha, as MeanSparse's reference code does.

    python benchmarks/sweep_speed.py --data-dir DIR              wall time, passes and choices, side by side in one run
    python benchmarks/sweep_speed.py --data-dir DIR --seeds 5    does racing agree with the full sweep, over seeds

The first appends its rows to ``benchmarks/SWEEP.md``.
Naive and ours face the same images at the same alphas with 100 steps of APGD-CE from the same random start an image,
which pyautoattack is given. "plain curve" is the naive loop's own work; "both curves" adds BPDA and the pool, which is
what `meansparse sweep-alpha` does.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attack_speed import leave_alone, machine
from meansparse_cli.attacks.budget import boundary_start, example_generator
from meansparse_cli.attacks.judge import CountedModel, judge, under_attack
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.data.examples import Examples, stack_examples
from meansparse_cli.data.facts import KNOWN_DATASETS
from meansparse_cli.data.splits import load_split, take_examples
from meansparse_cli.engine.grid import VariantGrid
from meansparse_cli.models.source import load_model, resolve_model
from meansparse_cli.operator.active import alpha_set
from meansparse_cli.operator.calibration import calibrate_channels
from meansparse_cli.operator.checkpoint import Checkpoint, sparsify
from meansparse_cli.operator.insertion import SparsifiedModel
from meansparse_cli.runs.device import keep_freed_memory
from meansparse_cli.selection.choice import ChoiceRule, Curve, SweepPoint, allowed, choose
from meansparse_cli.selection.racing import TOLERANCE, Race
from meansparse_cli.selection.sweep import Sweep, SweepSettings, grid_of, sweep_alphas
from meansparse_cli.settings.values import eps_value, parse_alphas
from meansparse_cli.sites.find import find_sites
from meansparse_cli.stats.paired import paired_difference

RESULTS = Path(__file__).parent / "SWEEP.md"
IN_HEADER = ("model", "calibration", "alphas", "max_clean_drop", "eps", "batch_size", "block_size")
"""Settings that no cell names: a row has their defaults."""
N_ORDERS = 1000  # in which the outcomes of a full sweep are raced over again, at no cost
HEADER = """# Speed of the sweep

Written by `make bench-sweep` (`benchmarks/sweep_speed.py`): embedded `resnet18-w16`, 5,000 images for the \
statistics, the
same held-out images and alphas (0, 0.05, ..., 0.4) on every row, APGD-CE with 100 steps. The naive loop runs first, \
with the allocator as users of
pyautoattack have it; ours keeps freed memory, as `meansparse` does. Passes are examples through the network, \
a backward pass
counted as two forward ones. In brackets: images seen where racing dropped an alpha.

| method | n | machine | s | ratio | passes | alpha | robust % at each alpha |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    source = resolve_model(options.model)
    facts = KNOWN_DATASETS[source.dataset]
    base = load_model(source).to(options.device)
    images = take_examples(load_split(source.dataset, options.data_dir, "calibration"), options.calibration)
    first, _ = stack_examples(take_examples(images, 4))
    sites = find_sites(base, first.to(options.device))
    statistics = calibrate_channels(base, sites, images, batch_size=options.batch_size)
    model = sparsify(base, Checkpoint(tuple(sites), tuple(statistics), "pooled"), alpha=0.0)
    budget = Budget("Linf", eps_value(options.eps or facts.eps["Linf"]))
    grid, _ = grid_of(parse_alphas(options.alphas))
    print(
        f"{options.model}, {options.n_examples} held-out images, alphas {', '.join(f'{a:g}' for a in grid)}, "
        f"Linf {budget.eps:.5f}, batch {options.batch_size}, {options.threads} threads, torch {torch.__version__}"
    )
    measure = Measurement(model, budget, grid, facts.n_classes, options)
    if options.seeds:
        measure.agreement(options.seeds)
    else:
        measure.speed()


class Measurement:
    """One model, one grid; each method is timed from nothing."""

    def __init__(
        self, model: SparsifiedModel, budget: Budget, grid: tuple[float, ...], n_classes: int, options: Any
    ) -> None:
        self.model, self.budget, self.grid, self.n_classes, self.options = model, budget, grid, n_classes, options
        self.dataset = resolve_model(options.model).dataset

    def examples(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        held_out = load_split(self.dataset, self.options.data_dir, "held-out")
        chosen = take_examples(held_out, self.options.n_examples, seed=seed)
        x, y = stack_examples(chosen)
        return x.to(self.options.device), y.to(self.options.device), torch.tensor(list(chosen.indices))

    def speed(self) -> None:
        seconds, points, passes = self.naive(0)
        if self.options.device == "cpu":
            keep_freed_memory()  # as the stage does, and no user of pyautoattack
        rule = ChoiceRule("apgd-ce", self.options.max_clean_drop / 100, attacks=("apgd-ce",))
        alpha = choose(points, rule).alpha
        self.show("naive loop (pyautoattack)", seconds, seconds, passes, alpha, points)
        goals: list[tuple[str, bool]] = []
        for name, bpda, racing, least in (
            ("ours, plain curve, all", (), False, 1.5),
            ("ours, plain curve, racing", (), True, 3.0),
            ("ours, both curves, all", ("bpda-apgd-ce",), False, None),
            ("ours, both curves, racing", ("bpda-apgd-ce",), True, None),
        ):
            if bpda and self.options.plain_only:
                continue
            mine, sweep, passes = self.ours(0, bpda=bpda, racing=racing)
            self.show(name, mine, seconds, passes, sweep.paper.alpha, sweep.points)
            if least is not None:
                goals.append((f"{name}: {least:g} times as fast", seconds / mine >= least))
                goals.append((f"{name}: the same alpha", sweep.paper.alpha == alpha))
                higher = [
                    100 * (float(p.plain.double().mean()) - float(q.plain.double().mean()))
                    for p, q in zip(sweep.points, points, strict=True)
                    if p.is_whole("plain")
                ]
                goals.append((f"{name}: robust accuracy at most {max(higher):+.1f} points above", max(higher) <= 0))
        for goal, is_met in goals:
            print(f"{'met' if is_met else 'MISSED':>6}  {goal}")

    def show(
        self, name: str, seconds: float, naive_seconds: float, passes: int, alpha: float, points: list[SweepPoint]
    ) -> None:
        """One line on the screen, one row of the results."""
        curve = " ".join(
            f"{100 * float(p.plain.double().mean()):.1f}" + ("" if p.is_whole("plain") else f" ({len(p.plain)})")
            for p in points
        )
        ratio = naive_seconds / seconds
        print(
            f"{name:26} {seconds:8.1f} s  {ratio:5.2f} x  {passes:>12,} passes (backward = 2)  alpha {alpha:g}  "
            f"robust %: {curve}"
        )
        if self.options.dry:
            return
        if not RESULTS.exists():
            RESULTS.write_text(HEADER)
        device = machine(torch.device(self.options.device))
        row = (
            name,
            self.options.n_examples,
            device,
            f"{seconds:.1f}",
            f"{ratio:.2f}",
            f"{passes:,}",
            f"{alpha:g}",
            curve,
        )
        with RESULTS.open("a") as file:
            file.write("| " + " | ".join(map(str, row)) + " |\n")

    def agreement(self, n_seeds: int) -> None:
        """Both races, on the plain curve and on the worst one, against sweeps that score everything."""
        bpda = () if self.options.plain_only else ("bpda-apgd-ce",)
        n_same, n_within, n_choices = 0, 0, 0
        replays: list[int] = []
        for seed in range(n_seeds):
            full_seconds, full, _ = self.ours(seed, bpda=bpda, racing=False)
            racing_seconds, raced, _ = self.ours(seed, bpda=bpda, racing=True)
            print(f"seed {seed}: {full_seconds:.0f} s for all, {racing_seconds:.0f} s with racing")
            for curve, theirs, ours in (("plain", full.paper, raced.paper), ("worst", full.worst, raced.worst)):
                if curve == "worst" and not bpda:
                    continue
                best, chosen = full.at(theirs.best), full.at(ours.best)
                d = paired_difference(best.measure(curve), chosen.measure(curve))
                # racing's stated error: one paired standard error of the full sweep, with one flip more than was seen
                stated = TOLERANCE * (d.standard_error**2 + d.n**-2) ** 0.5
                n_choices += 1
                n_same += best.alpha == chosen.alpha
                n_within += d.difference <= stated
                same, within = self.replay(full.points, curve, best, N_ORDERS, seed)
                replays += N_ORDERS, same, within
                print(
                    f"  best on the {curve} curve: all {best.alpha:g}, racing {chosen.alpha:g}, behind by "
                    f"{100 * d.difference:.2f} points (stated: {100 * stated:.2f}); replayed in {N_ORDERS} orders of "
                    f"these images: same alpha {same}, within the stated error {within}"
                )
        print(f"same alpha: {n_same} of {n_choices}; within the stated error: {n_within} of {n_choices}")
        n_replays, n_same, n_within = (sum(replays[i::3]) for i in range(3))
        print(f"replayed: same alpha {n_same} of {n_replays}; within the stated error {n_within} of {n_replays}")

    def replay(
        self, points: list[SweepPoint], curve: Curve, best: SweepPoint, n_orders: int, seed: int
    ) -> tuple[int, int]:
        """Race over the outcomes of a full sweep, its images in random orders: same choice, within the stated error."""
        generator = torch.Generator().manual_seed(seed)
        outcomes = {(p.alpha,): p.measure(curve) for p in allowed(points, self.options.max_clean_drop / 100)}
        n, same, within = len(best.clean), 0, 0
        for _ in range(n_orders):
            order = torch.randperm(n, generator=generator)
            race = Race(list(outcomes), (0.0,), n, lambda column: outcomes[column][order])  # noqa: B023
            for n_seen in range(self.options.block_size, n, self.options.block_size):
                race.look(n_seen)
            chosen = max(race.running, key=lambda column: (int(outcomes[column].sum()), -column[0]))
            d = paired_difference(best.measure(curve), outcomes[chosen])
            same += chosen == (best.alpha,)
            within += d.difference <= TOLERANCE * (d.standard_error**2 + d.n**-2) ** 0.5
        return same, within

    def problem(self, seed: int) -> Problem:
        return Problem(self.model, self.budget, self.n_classes, seed, self.options.batch_size)

    def naive(self, seed: int) -> tuple[float, list[SweepPoint], int]:
        """Alpha by alpha: clean accuracy, then pyautoattack's APGD-CE on everything that is right."""
        from pyautoattack.autopgd_base import APGDAttack

        class FromOurStarts(APGDAttack):  # type: ignore[misc]
            def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
                assert len(x) == len(points_of_start), "pyautoattack left out an image that is classified correctly"
                return super().attack_single_run(x, y, x_init=points_of_start)

        x, y, indices = self.examples(seed)
        generators = [example_generator(seed, "apgd-ce", 0, index) for index in indices.tolist()]
        starts = torch.stack(
            [boundary_start(image, g, self.budget) for image, g in zip(x.cpu(), generators, strict=True)]
        ).to(x.device)
        counted = CountedModel(self.model, n_classes=self.n_classes, device=x.device)
        problem = self.problem(seed)
        points, started = [], time.perf_counter()
        with under_attack(self.model):
            for alpha in self.grid:
                with alpha_set(self.model, alpha):
                    clean = ~judge(problem, x, y)
                    robust = clean.clone()
                    for rows in clean.nonzero().flatten().split(self.options.batch_size):
                        points_of_start = starts[rows]
                        attack: Any = FromOurStarts(
                            counted,
                            n_iter=100,
                            norm="Linf",
                            n_restarts=1,
                            eps=self.budget.eps,
                            seed=seed,
                            loss="ce",
                            eot_iter=1,
                            rho=0.75,
                            device=x.device,
                        )
                        found = attack.perturb(x[rows], y[rows])
                        robust[rows] = ~judge(problem, found, y[rows])
                mask = robust.cpu()
                points.append(SweepPoint(alpha, clean.cpu(), mask, mask, mask))
        n_judged = sum(len(point.clean) + int(point.clean.sum()) for point in points)
        return time.perf_counter() - started, points, counted.forward_passes + 2 * counted.backward_passes + n_judged

    def ours(self, seed: int, *, bpda: tuple[str, ...], racing: bool) -> tuple[float, Sweep, int]:
        x, y, indices = self.examples(seed)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            grid = VariantGrid(
                self.problem(seed),
                Examples(x, y, indices),
                plain=("apgd-ce",),
                bpda=bpda,
                folder=Path(folder),
                key={},
                block_size=self.options.block_size,
            )
            rule = ChoiceRule("apgd-ce", self.options.max_clean_drop / 100, attacks=("apgd-ce",))
            settings = SweepSettings(self.grid, rule, (1.0,) * len(self.model.sites), racing=racing)
            sweep = sweep_alphas(grid, settings)
            seconds, passes = time.perf_counter() - started, grid.passes()
        return seconds, sweep, passes["forward_passes"] + 2 * passes["backward_passes"]


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18-w16")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--n-examples", type=int, default=500)
    parser.add_argument("--calibration", type=int, default=5000, help="images for the statistics")
    parser.add_argument("--alphas", default="0.05:0.4:0.05")
    parser.add_argument("--max-clean-drop", type=float, default=0.5)
    parser.add_argument("--eps")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plain-only", action="store_true", help="leave out the sweeps with BPDA")
    parser.add_argument("--dry", action="store_true", help="leave SWEEP.md alone")
    parser.add_argument("--seeds", type=int, default=0, help="compare racing with the full sweep over so many seeds")
    options = parser.parse_args()
    leave_alone(RESULTS, parser, options, IN_HEADER)
    return options


if __name__ == "__main__":
    main()
