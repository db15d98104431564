"""Our attacks beside pyautoattack's, in one run: the same model, images, seed, budgets, threads and device.

    python benchmarks/attack_speed.py --data-dir DIR [--n-apgd 1000] [--n-standard 200] [--device auto]

The model is the embedded ``resnet18-w16``; the images are the first N test images of its seeded order. Both sides attack
what is classified correctly, APGD-CE alone and then the standard preset, and every claimed break is judged in one way, in
float32. A row of each is appended to ``benchmarks/RESULTS.md``.
"""

import argparse
import copy
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from meansparse_cli.allocator import keep_freed_memory
from meansparse_cli.attacks import PRESETS, run_attack
from meansparse_cli.attacks.budget import enforce_budget
from meansparse_cli.attacks.counting import CountedModel
from meansparse_cli.attacks.judge import is_misclassified, under_attack
from meansparse_cli.attacks.precision import PRECISIONS
from meansparse_cli.attacks.result import AttackResult, Budget
from meansparse_cli.config import eps_value
from meansparse_cli.data import load_split, stack_examples, take_examples
from meansparse_cli.models import load_model, resolve_model

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADER = """# Speed of the attacks

Written by `make bench` (`benchmarks/attack_speed.py`): embedded `resnet18-w16`, Linf 8/255, the same images, seed and
budgets on both sides, every break judged in float32; on a CPU pyautoattack runs first, with the allocator as its users
have it, and then ours, with freed memory kept as `meansparse` keeps it. Passes are examples through the network, means over the examples
that an attack faced; pyautoattack's are not known by fate. The last column lists the examples (positions among the n) that
are robust on one side only.

| what | n | machine | setting | ours, s | pyautoattack, s | ratio | robust, ours | robust, pyautoattack | passes (forward / backward) ours, robust | ours, fallen | pyautoattack, all | robust on one side only |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


@dataclass
class Side:
    """What one side took and left standing."""

    seconds: float = 0.0
    robust: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    forward: int = 0
    backward: int = 0
    forward_fallen: int = 0
    backward_fallen: int = 0
    by_attack: dict[str, float] = field(default_factory=dict)


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
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=250, help="of both sides; AutoAttack's default")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--norm", choices=("Linf", "L2"), default="Linf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of our search")
    parser.add_argument("--compile", action="store_true", help="our search on a compiled model")
    parser.add_argument("--no-channels-last", action="store_true")
    parser.add_argument("--dry", action="store_true", help="leave RESULTS.md alone")
    options = parser.parse_args()
    # not by pick_device, which sets the allocator: pyautoattack runs first, without that
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(default if options.device == "auto" else options.device)
    budget = Budget(options.norm, eps_value(options.eps))
    model = load_model(resolve_model("resnet18-w16"), None).to(device).eval()
    theirs = {}
    for what, n in (("apgd-ce", options.n_apgd), ("standard", options.n_standard)):
        if n:
            x, y = images_and_labels(n, device, options)
            theirs[what] = run_theirs(attacks_of(what), copy.deepcopy(model), x, y, budget, options)
    if device.type == "cpu":
        keep_freed_memory()  # as every stage does, and no user of pyautoattack
    for what, side in theirs.items():
        compare(what, model, side, budget, device, options)


def attacks_of(what: str) -> tuple[str, ...]:
    return PRESETS["standard"] if what == "standard" else (what,)


def images_and_labels(n: int, device: torch.device, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(n, c, h, w) images in [0, 1] and (n,) labels: the first of the seeded order."""
    x, y = stack_examples(take_examples(load_split("cifar10", options.data_dir, "test"), n, seed=options.seed))
    return x.to(device), y.to(device)


def compare(
    what: str, model: nn.Module, theirs: Side, budget: Budget, device: torch.device, options: argparse.Namespace
) -> None:
    """Our side on the images that ``theirs`` had; prints, and appends a row to the results."""
    n, attacks = len(theirs.robust), attacks_of(what)
    x, y = images_and_labels(n, device, options)
    ours = run_ours(attacks, model, x, y, budget, options)
    n_fallen = int((~ours.robust & ~wrong(model, x, y)).sum())
    n_robust = int(ours.robust.sum())
    setting = ", ".join(
        [options.precision, *(["compile"] if options.compile else []), *([] if options.no_channels_last else ["channels-last"])]
    )  # fmt: skip
    differ = "; ".join(
        f"{side}: {', '.join(map(str, rows.nonzero().flatten().tolist()))}"
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
        what, str(n), machine(device), setting, f"{ours.seconds:.1f}", f"{theirs.seconds:.1f}",
        f"{theirs.seconds / ours.seconds:.2f}", f"{100 * ours.robust.float().mean():.1f} %",
        f"{100 * theirs.robust.float().mean():.1f} %", *cells, differ or "none",
    ]  # fmt: skip
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


def run_ours(
    attacks: tuple[str, ...], model: nn.Module, x: Tensor, y: Tensor, budget: Budget, options: argparse.Namespace
) -> Side:
    """Each attack on what the ones before have left."""
    searched = copy.deepcopy(model)
    if not options.no_channels_last:
        searched = searched.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.compile:
        searched = torch.compile(searched)  # type: ignore[assignment]
    side, n = Side(), len(x)
    indices = torch.arange(n)
    warm_up(searched, x, y, options, budget)
    started = now(x.device)
    robust = torch.ones(n, dtype=torch.bool, device=x.device)
    for attack in attacks:
        before = now(x.device)
        for rows in robust.nonzero().flatten().split(options.batch_size):  # as `meansparse evaluate` does
            result: AttackResult = run_attack(
                attack, model, x[rows], y[rows], indices[rows.cpu()], budget=budget, seed=options.seed,
                batch_size=options.batch_size, n_classes=10, search_model=searched, precision=options.precision,
            )  # fmt: skip
            robust[rows[result.broken]] = False
            side.forward += result.forward_passes
            side.backward += result.backward_passes
            fallen = result.passes[result.broken.cpu()].sum(dim=0).tolist()
            side.forward_fallen, side.backward_fallen = (
                side.forward_fallen + fallen[0],
                side.backward_fallen + fallen[1],
            )
        side.by_attack[attack] = now(x.device) - before
    side.seconds, side.robust = now(x.device) - started, robust.cpu()
    return side


def run_theirs(
    attacks: tuple[str, ...], model: nn.Module, x: Tensor, y: Tensor, budget: Budget, options: argparse.Namespace
) -> Side:
    """AutoAttack as its users call it."""
    from pyautoattack import AutoAttack

    counting = Counting(model)
    settings = {"norm": budget.norm, "eps": budget.eps, "seed": options.seed, "device": str(x.device)}
    if len(attacks) == 1:
        attack = AutoAttack(counting, version="custom", attacks=list(attacks), **settings)
        attack.apgd.n_restarts = 1  # as in the standard version
    else:
        attack = AutoAttack(counting, version="standard", **settings)
    side = Side()
    warm_up(model, x, y, options, budget)
    with timed_log(side):
        started = now(x.device)
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=options.batch_size)
        side.seconds = now(x.device) - started
    side.forward, side.backward = counting.forward_passes, counting.backward_passes
    side.robust = ~wrong(model, enforce_budget(adversarial.detach(), x, budget), y)
    return side


class timed_log(logging.Handler):  # noqa: N801
    """Reads the time of each attack from what AutoAttack logs."""

    def __init__(self, side: Side) -> None:
        super().__init__(logging.DEBUG)
        self.side, self.total, self.logger = side, 0.0, logging.getLogger("auto-attack")

    def __enter__(self) -> None:
        self.logger.addHandler(self)
        self.logger.setLevel(logging.DEBUG)
        self.logger.propagate = False

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"robust accuracy after ([\w-]+): .*total time ([\d.]+) s", record.getMessage())
        if found:
            self.side.by_attack[found[1].lower()] = float(found[2]) - self.total
            self.total = float(found[2])


def wrong(model: nn.Module, images: Tensor, y: Tensor) -> Tensor:
    """(n,) bool on the CPU, judged in float32."""
    with under_attack(model):
        counted = CountedModel(model, n_classes=10, device=images.device)
        return is_misclassified(counted, images, y, batch_size=250).cpu()


def warm_up(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace, budget: Budget) -> None:
    """Kernels are chosen and compiled before the clock runs."""
    few = slice(0, options.batch_size)
    for _ in range(2):
        run_attack(
            "pgd-3", model, x[few], y[few], torch.arange(len(x[few])), budget=Budget(budget.norm, 1e-6), seed=0,
            batch_size=options.batch_size, n_classes=10, precision=options.precision,
        )  # fmt: skip


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
