"""``--plan``: what a stage would cost, from a few timed batches; nothing is written.

A pilot takes the first images through one short attack, which tells how long a pass takes and how many examples are
likely to withstand: those are what all later attacks cost.
"""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ..attacks import expand_attacks, find_attack
from ..attacks.judge import logits, variants_set
from ..attacks.problem import Problem
from ..attacks.runner import run_attack
from ..data.examples import Examples
from ..data.splits import Split
from ..diagnostics import DIAGNOSTICS_COST
from ..engine.cells import Cells
from ..engine.grid import Family, Variant, VariantGrid
from ..engine.outcomes import each_model, run_order, tried_on
from ..engine.state import eps_state_folder
from ..files import load_torch
from ..operator.calibration import calibrate_channels
from ..reporting.console import note, phase
from ..reporting.heartbeat import duration
from ..runs.context import RunContext
from ..settings.stages import CalibrateConfig, EvaluateConfig, VerifyConfig
from ..settings.values import eps_grid
from ..sites.find import Site

SHORT = "apgd-margin-30"
SECONDS, FEWEST = 20.0, 16
"""Of a pilot: images, as many as a batch holds, but for so long at most, and not fewer than these."""
FIND_EPS = 5
"""Times, about, that the attacks of an example that survives are run again for its smallest eps."""
MANY = 8
"""Workers that the plan names beside one."""


@dataclass(frozen=True)
class Pilot:
    """Of one variant: shares of images, ``right`` when clean and ``left`` by a short attack, of whose passes one that
    breaks costs the share ``early``. Seconds an image: ``forward``, and forward and backward, ``step``.
    """

    right: float
    left: float
    early: float
    forward: float
    step: float

    def of_attacks(self, attacks: Sequence[str], n: int) -> dict[str, tuple[float, float]]:
        """Attack -> passes and seconds on n images, each on what the ones before have left."""
        costs, n_full = {}, n * (self.left + (self.right - self.left) * self.early)
        for spec in map(find_attack, attacks):
            seconds = self.forward if spec.search == "square" else self.step / 3
            costs[spec.name] = n_full * spec.cost, n_full * spec.cost * seconds
            n_full = n * self.left
        return costs


def pilot(problem: Problem, examples: Examples, variant: Tensor) -> Pilot:
    """The first images under the first steps of what is to come."""
    cells = Cells(problem, examples)
    few = cells.at(torch.arange(min(FEWEST, len(examples))))
    with phase("timing"), variants_set(problem.model, variant):
        logits(problem, few.x)  # what is compiled and allocated once
        started = time.perf_counter()
        logits(problem, few.x)
        affordable = SECONDS * len(few) / find_attack(SHORT).cost / (time.perf_counter() - started)
        few = cells.at(torch.arange(min(len(examples), problem.batch_size, max(FEWEST, int(affordable)))))
        started = time.perf_counter()
        clean = logits(problem, few.x)
        forward = (time.perf_counter() - started) / len(few)
    found = run_attack(SHORT, problem, few, variant)
    right = clean.argmax(dim=1).cpu() == few.y.cpu()
    broken = found.broken.cpu() & right
    n_steps = max(1, int(found.passes[right, 1].sum()))
    n_full = find_attack(SHORT).options[0][1]
    early = float(found.passes[broken, 1].float().mean()) / float(n_full) if broken.any() else 0.0
    shares = float(right.float().mean()), float((right & ~broken).float().mean())
    return Pilot(*shares, min(early, 1.0), forward, max(found.seconds - len(few) * forward, 0.0) / n_steps)


def tell(stage: str, device: str, what: str, *, seconds: float, done: float, passes: float = 0) -> None:
    """``what``: images x variants x attacks; ``seconds`` and ``passes`` of all of it, ``done`` a share of it."""
    left = seconds * (1 - done)
    if device.startswith("cuda"):
        machine, memory = torch.cuda.get_device_name(device), torch.cuda.max_memory_reserved(device)
    else:
        machine = f"CPU, {torch.get_num_threads()} threads"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    about = f", about {passes:,.0f} passes (a backward pass counts two)" if passes else ""
    note(f"plan of {stage}: {what}{about}")
    note(f"done already: {100 * done:.0f} %")
    many = f"{MANY} such workers: {duration(left / MANY)}"
    note(f"left, on this machine ({machine}): about {duration(left)}; {many}")
    note(f"memory so far: {memory / 2**30:.1f} GiB")


def plan_evaluation(
    context: RunContext[EvaluateConfig], problem: Problem, examples: Examples, alpha: float, folder: Path
) -> None:
    """Of every attack on both models, and the sanity checks, at each eps; ``folder``: what is done already."""
    config, n, grid = context.config, len(examples), eps_grid(str(context.config.eps))
    states, n_eps = [eps_state_folder(folder, eps, grid) for eps in grid], len(grid)
    order, cells = run_order(expand_attacks(config.attack)), Cells(problem, examples)
    alphas = each_model(alpha)
    passes = seconds = done = 0.0
    for name, of_model in alphas.items():
        timed = pilot(problem, examples, cells.everywhere(of_model))
        own = tried_on(name, order)
        times = 1 + (FIND_EPS / n_eps if config.find_eps else 0)
        for attack, (n_passes, n_seconds) in timed.of_attacks(own, n).items():
            passes, seconds = passes + times * n_passes, seconds + times * n_seconds
            n_faced = n * (timed.left if attack != own[0] else timed.right)
            for state in states:
                n_there = sum(len(load_torch(file)["positions"]) for file in (state / name / attack).glob("*.pt"))
                done += n_seconds * min(1.0, n_there / max(1.0, n_faced))
        if config.doubts:
            n_passes = DIAGNOSTICS_COST * min(config.n_doubt_examples, n) * timed.left
            passes, seconds = passes + n_passes, seconds + n_passes * timed.step / 3
    what = f"{n:,} images x {len(alphas)} models x {len(order)} attacks" + (f" x {n_eps} eps" if n_eps > 1 else "")
    done /= max(seconds * n_eps, 1e-9)
    tell(context.stage, context.device, what, passes=passes * n_eps, seconds=seconds * n_eps, done=done)


def plan_grid(context: RunContext[Any], grid: VariantGrid, variants: Sequence[Variant], n_eps: int = 1) -> None:
    """Of every attack at all variants, as far as racing drops none."""
    problem, n = grid.cells.problem, len(grid)
    weakest, strongest = (torch.tensor(pick(variants, key=sum)) for pick in (min, max))
    ends = [pilot(problem, grid.cells.examples, variant) for variant in (weakest, strongest)]
    passes = seconds = 0.0
    for attacks in grid.attacks.values():
        for of_end in ends:
            for n_passes, n_seconds in of_end.of_attacks(attacks, n).values():
                passes += n_passes * len(variants) / 2 * n_eps
                seconds += n_seconds * len(variants) / 2 * n_eps
    wanted: dict[Family, Sequence[Variant]] = dict.fromkeys(grid.attacks, variants)
    triples = n * len(variants) * sum(map(len, grid.attacks.values()))
    missing = sum(grid.count_missing(b, wanted) for b in range(len(grid.blocks)))
    what = f"{n:,} images x {len(variants)} variants x {sum(map(len, grid.attacks.values()))} attacks"
    what += f" x {n_eps} eps" if n_eps > 1 else ""
    done = (1 - missing / max(triples, 1)) / n_eps
    tell(context.stage, context.device, what, passes=passes, seconds=seconds, done=done)


def plan_judging(context: RunContext[VerifyConfig], problem: Problem, few: Examples, *, n: int, n_done: int) -> None:
    """Of n examples, each clean and with its image, on every model that judges; ``few`` of them are timed."""
    n_models = len(each_model(context.config.alpha or 0.0))
    for _ in range(2):  # the first one allocates
        started = time.perf_counter()
        logits(problem, few.x)
        seconds = 2 * n_models * (time.perf_counter() - started) / len(few) * n
    what = f"{n:,} examples x {n_models} models"
    tell(context.stage, context.device, what, passes=2 * n_models * n, seconds=seconds, done=n_done / n)


def plan_pass(context: RunContext[CalibrateConfig], model: nn.Module, sites: Sequence[Site], images: Split) -> None:
    """Of one pass for the statistics."""
    size = min(context.batch_size, len(images))
    for n_batches in (1, 2):  # the first one compiles and allocates
        few = Subset(images.dataset, list(images.indices)[: size * n_batches])
        started = time.perf_counter()
        calibrate_channels(model, sites, few, batch_size=size, estimator=context.config.estimator)
        seconds = (time.perf_counter() - started) / len(few)
    tell(context.stage, context.device, f"{len(images):,} images", seconds=seconds * len(images), done=0)
