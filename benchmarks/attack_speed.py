"""Our attacks beside pyautoattack's, in one run: the same model, images, seed, budgets, precision, threads and device.

    python benchmarks/attack_speed.py --data-dir DIR [--n-apgd 1000] [--n-standard 200] [--n-fast 0] [--device auto]

The model is the embedded ``resnet18-w16``; the images are the first N test images of its seeded order. Both sides
attack what is classified correctly: APGD-CE alone, the standard preset, our ``fast`` beside its standard preset. Every
claimed break is judged in one way, in float32. The sides take turns of a few seconds, each in a process of its own, so
that a machine that slows down slows down both. A row of each is appended to ``benchmarks/RESULTS.md``.
"""

import argparse
import copy
import logging
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meansparse_cli.attacks import PRESETS
from meansparse_cli.attacks.budget import enforce_budget
from meansparse_cli.attacks.judge import judge
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.data.examples import Examples, stack_examples
from meansparse_cli.data.splits import load_split, take_examples
from meansparse_cli.engine.outcomes import tried_on
from meansparse_cli.models.source import load_model, resolve_model
from meansparse_cli.operator.device import PRECISIONS, precision_on, search_precision
from meansparse_cli.runs.device import keep_freed_memory
from meansparse_cli.settings.values import eps_value

RESULTS = Path(__file__).parent / "RESULTS.md"
IN_HEADER = ("norm", "eps", "batch_size", "seed")  # settings that no cell names: a row has their defaults
HEADER = """# Speed of the attacks

Written by `make bench` (`benchmarks/attack_speed.py`): embedded `resnet18-w16`, Linf 8/255, the same images, seed and
budgets on both sides, every break judged in float32. The sides take turns of five seconds, each in a process of its own: on
a CPU pyautoattack has the allocator as its users have it, ours keeps freed memory as `meansparse` does. Passes are examples
through the network, means over the examples that an attack faced; pyautoattack's are not known by fate. The last column
lists the examples (positions among the n) that are robust on one side only.

| what | n | machine | setting | ours, s | pyautoattack, s | ratio | robust, ours | robust, pyautoattack | passes (forward / backward) ours, robust | ours, fallen | pyautoattack, all | robust on one side only |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


@dataclass
class Side:
    """What one side took and left standing; ``robust`` (n,) is no tensor, which would not outlive its process."""

    seconds: float = 0.0
    robust: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    forward: int = 0
    backward: int = 0
    forward_fallen: int = 0
    backward_fallen: int = 0
    by_attack: dict[str, float] = field(default_factory=dict)


class Turns:
    """The clock of one side, which runs while it is its turn.

    Before each forward pass of its model a side that has had ``SLICE`` seconds hands over and waits.
    """

    SLICE = 5.0

    def __init__(self, other: Connection, device: torch.device) -> None:
        self.other, self.device, self.is_alone = other, device, False
        self._before, self._since = 0.0, 0.0

    @property
    def seconds(self) -> float:
        return self._before + now(self.device) - self._since

    def begin(self) -> None:
        self._wait()

    def hand_over(self, *_: object) -> None:
        """A forward pre-hook."""
        if self.is_alone or time.perf_counter() - self._since < self.SLICE:
            return
        self._before = self.seconds
        self.other.send("your turn")
        self._wait()

    def end(self) -> float:
        """The seconds taken; the other side goes on alone."""
        seconds = self.seconds
        self.other.send("alone")
        return seconds

    def _wait(self) -> None:
        self.is_alone = self.other.recv() == "alone"
        self._since = now(self.device)


class Counting(nn.Module):
    """Counts the examples that pass through the network, forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forward_passes, self.backward_passes = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forward_passes += len(x)
        logits: Tensor = self.model(x)
        if logits.requires_grad and x.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, grad: Tensor) -> None:
        self.backward_passes += len(grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("MEANSPARSE_DATA"))
    parser.add_argument("--n-apgd", type=int, default=1000, help="images for APGD-CE alone; 0 leaves it out")
    parser.add_argument("--n-standard", type=int, default=200, help="images for the standard preset; 0 leaves it out")
    parser.add_argument("--n-fast", type=int, default=0, help="images for the preset fast beside their standard")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=250, help="of both sides; AutoAttack's default")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--norm", choices=("Linf", "L2"), default="Linf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, help="of both sides, bf16 of ours; tf32 on a GPU by default")
    parser.add_argument("--compile", action="store_true", help="our search on a compiled model")
    parser.add_argument("--no-channels-last", action="store_true")
    parser.add_argument("--dry", action="store_true", help="leave RESULTS.md alone")
    options = parser.parse_args()
    leave_alone(RESULTS, parser, options, IN_HEADER)
    # not by pick_device, which sets the allocator: the process of pyautoattack starts without that
    default = "cuda" if torch.cuda.is_available() else "cpu"
    options.device = torch.device(default if options.device == "auto" else options.device)
    options.precision = precision_on(options.device.type, options.precision)
    for what, n in (("apgd-ce", options.n_apgd), ("standard", options.n_standard), ("fast", options.n_fast)):
        if n:
            compare(what, n, options)


def leave_alone(
    results: Path, parser: argparse.ArgumentParser, options: argparse.Namespace, in_header: Sequence[str]
) -> None:
    """Make the run a ``--dry`` one where an option that the header of ``results`` states is not at its default."""
    changed = [name for name in in_header if getattr(options, name) != parser.get_default(name)]
    if changed and not options.dry:
        print(
            f"{results.name} is about other settings than this {', '.join(changed)}: no row is written", file=sys.stderr
        )
        options.dry = True


def attacks_of(what: str) -> tuple[str, ...]:
    """Ours; those of another backward rule are no further attacks on a model without operators."""
    return tuple(tried_on("base", PRESETS.get(what, (what,))))


def model_and_images(n: int, options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, (n, c, h, w) images in [0, 1] and (n,) labels: the first of the seeded order."""
    model = load_model(resolve_model("resnet18-w16"), None).to(options.device).eval()
    x, y = stack_examples(take_examples(load_split("cifar10", options.data_dir, "test"), n, seed=options.seed))
    return model, x.to(options.device), y.to(options.device)


def compare(what: str, n: int, options: argparse.Namespace) -> float:
    """How many times faster ours is on the same images; prints, and appends a row to the results."""
    attacks, device = attacks_of(what), options.device
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=run_theirs, args=(there, attacks, n, options, torch.get_num_threads()), daemon=True)
    child.start()
    there.close()
    if device.type == "cpu":
        keep_freed_memory()  # as every stage does, and no user of pyautoattack
    model, x, y = model_and_images(n, options)
    ours = run_ours(attacks, model, x, y, Turns(here, device), options)
    while not isinstance(theirs := here.recv(), Side):
        pass  # what it said to a side that was over
    child.join()
    n_fallen = int((~ours.robust & ~wrong(model, x, y).numpy()).sum())
    n_robust = int(ours.robust.sum())
    setting = ", ".join(
        [
            options.precision,
            *(["compile"] if options.compile else []),
            *([] if options.no_channels_last else ["channels-last"]),
        ]
    )
    differ = "; ".join(
        f"{side}: {', '.join(map(str, rows.nonzero()[0]))}"
        for side, rows in (("ours", ours.robust & ~theirs.robust), ("pyautoattack", theirs.robust & ~ours.robust))
        if rows.any()
    )
    passes = [
        (ours.forward - ours.forward_fallen, ours.backward - ours.backward_fallen, n_robust),
        (ours.forward_fallen, ours.backward_fallen, n_fallen),
        (theirs.forward, theirs.backward, n_robust + n_fallen),
    ]
    cells = [f"{f / max(k, 1):,.0f} / {b / max(k, 1):,.0f}" for f, b, k in passes]
    row = [
        what,
        str(n),
        machine(device),
        setting,
        f"{ours.seconds:.1f}",
        f"{theirs.seconds:.1f}",
        f"{theirs.seconds / ours.seconds:.2f}",
        f"{100 * ours.robust.mean():.1f} %",
        f"{100 * theirs.robust.mean():.1f} %",
        *cells,
        differ or "none",
    ]
    for name, value in zip([c.strip() for c in HEADER.splitlines()[-2].strip("|").split("|")], row, strict=True):
        print(f"{name:>55}  {value}", file=sys.stderr)
    for attack in attacks:
        mine, other = ours.by_attack.get(attack), theirs.by_attack.get(attack)
        print(f"{attack:>55}  {mine or 0:.1f} s ours, {other or 0:.1f} s pyautoattack", file=sys.stderr)
    if not options.dry:
        if not RESULTS.exists():
            RESULTS.write_text(HEADER)
        with RESULTS.open("a") as file:
            file.write("| " + " | ".join(row) + " |\n")
    return theirs.seconds / ours.seconds


def run_ours(
    attacks: tuple[str, ...], model: nn.Module, x: Tensor, y: Tensor, turns: Turns, options: argparse.Namespace
) -> Side:
    """Each attack on what the ones before have left."""
    searched = copy.deepcopy(model)
    if not options.no_channels_last:
        searched = searched.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.compile:
        searched = torch.compile(searched)  # type: ignore[assignment]
    side, n, budget = Side(), len(x), budget_of(options)
    examples = Examples(x, y, torch.arange(n))
    problem = Problem(model, budget, 10, options.seed, options.batch_size, options.precision, search_model=searched)
    warm_up(searched, x, y, options)
    turns.begin()
    robust = torch.ones(n, dtype=torch.bool, device=x.device)
    hook = searched.register_forward_pre_hook(turns.hand_over)
    for attack in attacks:
        before = turns.seconds
        for rows in robust.nonzero().flatten().split(options.batch_size):  # as `meansparse evaluate` does
            result = run_attack(attack, problem, examples.at(rows))
            robust[rows[result.broken]] = False
            side.forward += result.forward_passes
            side.backward += result.backward_passes
            fallen = result.passes[result.broken.cpu()].sum(dim=0).tolist()
            side.forward_fallen, side.backward_fallen = (
                side.forward_fallen + fallen[0],
                side.backward_fallen + fallen[1],
            )
        side.by_attack[attack] = turns.seconds - before
    side.seconds, side.robust = turns.end(), robust.cpu().numpy()
    hook.remove()
    return side


def run_theirs(
    other: Connection, attacks: tuple[str, ...], n: int, options: argparse.Namespace, n_threads: int
) -> None:
    """AutoAttack as its users call it, in a process of its own; sends its ``Side`` when it is over."""
    from pyautoattack import AutoAttack

    torch.set_num_threads(n_threads)
    model, x, y = model_and_images(n, options)
    counting, budget = Counting(model), budget_of(options)
    settings = {"norm": budget.norm, "eps": budget.eps, "seed": options.seed, "device": str(options.device)}
    if len(attacks) == 1:
        attack = AutoAttack(counting, version="custom", attacks=list(attacks), **settings)
        attack.apgd.n_restarts = 1  # as in the standard version
    else:
        attack = AutoAttack(counting, version="standard", **settings)
    side, turns = Side(), Turns(other, options.device)
    warm_up(model, x, y, options)
    counting.register_forward_pre_hook(turns.hand_over)
    other.send("your turn")
    turns.begin()
    # PyTorch's own default on a GPU is a mixture: TF32 in convolutions, float32 in matrix products
    theirs = "tf32" if options.precision == "bf16" else options.precision
    with timed_log(side, turns), search_precision(options.device, theirs):
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=options.batch_size)
    side.seconds = turns.end()
    side.forward, side.backward = counting.forward_passes, counting.backward_passes
    side.robust = ~wrong(model, enforce_budget(adversarial.detach(), x, budget), y).numpy()
    other.send(side)


def budget_of(options: argparse.Namespace) -> Budget:
    return Budget(options.norm, eps_value(options.eps))


class timed_log(logging.Handler):  # noqa: N801
    """Takes the time of each attack when AutoAttack logs that it is over."""

    def __init__(self, side: Side, turns: Turns) -> None:
        super().__init__(logging.DEBUG)
        self.side, self.turns, self.logger = side, turns, logging.getLogger("auto-attack")

    def __enter__(self) -> None:
        self.logger.addHandler(self)
        self.logger.setLevel(logging.DEBUG)
        self.logger.propagate = False

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"robust accuracy after ([\w-]+): ", record.getMessage())
        if found:
            self.side.by_attack[found[1].lower()] = self.turns.seconds - sum(self.side.by_attack.values())


def wrong(model: nn.Module, images: Tensor, y: Tensor) -> Tensor:
    """(n,) bool on the CPU, judged in float32."""
    return judge(Problem(model, Budget("Linf", 0.0), n_classes=10, seed=0, batch_size=250), images, y).cpu()


def warm_up(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> None:
    """Kernels are chosen and compiled before the clock runs."""
    few = slice(0, options.batch_size)
    for _ in range(2):
        problem = Problem(model, Budget(options.norm, 1e-6), 10, 0, options.batch_size, options.precision)
        run_attack("pgd-3", problem, Examples(x[few], y[few], torch.arange(len(x[few]))))


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> str:
    """What a reader has to know to compare."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}, pyautoattack {version('pyautoattack')}"


def _processor() -> str:
    read: Callable[[], str] = Path("/proc/cpuinfo").read_text
    found = re.search(r"model name\s*:\s*(.+)", read()) if Path("/proc/cpuinfo").exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
