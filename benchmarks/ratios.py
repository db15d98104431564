"""The ratios of speed that this project states, sweeps apart (``sweep_speed.py``), in one run.

    python benchmarks/ratios.py --data-dir DIR [--short] [--device auto]

What is compared takes turns, so that a machine that slows down slows down both; a ratio is the median over the rounds,
with the middle half of them in brackets. Memory is what a forward pass keeps for the backward one, counted. Attacks are
beside pyautoattack's (``attack_speed.py``); workers are processes of the command line, each with one thread and one
core. A Markdown table goes to stdout.
"""

import argparse
import copy
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import attack_speed
from meansparse_cli import calibrate, sparsify
from meansparse_cli.attacks.problem import Problem
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.data.examples import Examples
from meansparse_cli.models.robustbench import import_robustbench
from meansparse_cli.operator.calibration import ChannelObserver, add_batch, observed
from meansparse_cli.operator.device import precision_on
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.sites.find import find_sites

SHAPES = {"CNN, 128 x 64 x 32 x 32, GELU": ((128, 64, 32, 32), 1), "tokens, 64 x 197 x 768, GELU": ((64, 197, 768), 2)}
Row = tuple[str, str, str]


class Tokens(nn.Module):
    """RobustBench's module, which is for (n, channels, height, width), in front of tokens (n, tokens, channels)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("MEANSPARSE_DATA"))
    parser.add_argument("--short", action="store_true", help="small sizes, about five minutes on two cores")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("--data-dir DIR: the CIFAR-10 images")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device, rounds = torch.device(name), 7 if options.short else 25
    print(f"{attack_speed.machine(device)}; {rounds} rounds\n\n| what | ratio | counted |\n|---|---|---|", flush=True)
    attacks = argparse.Namespace(
        data_dir=options.data_dir, device=device, batch_size=250, eps="8/255", norm="Linf", seed=0,
        precision=precision_on(device.type, None), compile=False, no_channels_last=False, dry=options.short,
    )  # fmt: skip
    sizes = ((100, 12, 24), (40, 40)) if options.short else ((1000, 60, 60), (160, 160))
    for name, (shape, axis) in SHAPES.items():
        say(*operator(shape, axis, name, device, rounds))
    for row in on_a_model(attacks, rounds):
        say(*row)
    say(*low_precision(250 if options.short else 500, attacks))
    for what, n in zip(("apgd-ce", "standard", "fast"), sizes[0], strict=True):
        theirs = "standard" if what == "fast" else what
        say(f"pyautoattack's {theirs} over our {what}", f"{attack_speed.compare(what, n, attacks):.2f}", f"{n} images")
    if device.type == "cpu":
        for stage, n in zip(("evaluate", "sweep-alpha"), sizes[1], strict=True):
            say(*workers(stage, n, options.data_dir))


def say(what: str, ratio: str, counted: str) -> None:
    print(f"| {what} | {ratio} | {counted} |", flush=True)


def in_turns(first: Callable[[], object], other: Callable[[], object], rounds: int, device: torch.device) -> str:
    """Time of ``other`` over that of ``first``."""
    ratios = []
    for i in range(rounds + 2):
        seconds = []
        for run in (first, other):
            before = attack_speed.now(device)
            run()
            seconds.append(attack_speed.now(device) - before)
        if i > 1:  # the first ones warm up
            ratios.append(seconds[1] / seconds[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def kept(run: Callable[[], object]) -> int:
    """Bytes that the forward passes of ``run`` keep for the backward ones, each storage once."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = run()
    del held
    return sum(sizes.values())


def operator(shape: tuple[int, ...], axis: int, name: str, device: torch.device, rounds: int) -> Row:
    """The operator and the activation after it, forward and backward, against RobustBench's module in its place."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).requires_grad_()
    n_channels, upstream = shape[axis], torch.randn(shape, device=device)
    mean, std = torch.zeros(n_channels, device=device), torch.ones(n_channels, device=device)
    import_robustbench()
    architecture = importlib.import_module("robustbench.model_zoo.architectures.Meansparse_wrn_94_16")
    theirs: nn.Module = architecture.MeanSparse(n_channels).to(device)
    theirs.running_var.fill_(1.0)
    theirs.threshold.fill_(0.25)  # type: ignore[operator]
    if axis == 2:
        theirs = Tokens(theirs)
    ours = MeanSparse(mean, std, 0.25, axis).to(device)
    modules = [nn.Sequential(module, nn.GELU()) for module in (ours, theirs)]
    assert torch.equal(*(module(x) for module in modules))

    def step(module: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(module(x), x, upstream)

    alone = kept(lambda: nn.GELU()(x))
    extra = [kept(lambda module=module: module(x)) - alone for module in modules]  # type: ignore[misc]
    ratio = in_turns(step(modules[0]), step(modules[1]), rounds, device)
    times = in_turns(step(nn.GELU()), step(modules[0]), rounds, device)
    memory = ", ".join(f"{size / 2**20:.1f}" for size in extra)
    return (
        f"RobustBench's module and activation over ours, {name}", ratio,
        f"extra memory ours, theirs: {memory} MiB; ours over the activation alone: {times}",
    )  # fmt: skip


def on_a_model(options: argparse.Namespace, rounds: int) -> Iterable[Row]:
    """The statistics pass over plain inference; a gradient step of the sparsified model over one of the base model."""
    base, x, y = attack_speed.model_and_images(options.batch_size, options)
    sites = find_sites(base, x[:4])

    def infer() -> None:
        with torch.no_grad():
            base(x)

    with observed(copy.deepcopy(base), sites, "pooled") as wrapper:
        observers = [cast(ChannelObserver, wrapper.at(site)) for site in sites]
        ratio = in_turns(infer, lambda: add_batch(wrapper, observers, x), rounds, options.device)
    yield "statistics pass over plain inference, resnet18-w16", ratio, f"{len(sites)} sites, {len(x)} images"
    sparse = sparsify(base, calibrate(base, [x]), 0.25)
    image = x.clone().requires_grad_()

    def step(model: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(nn.functional.cross_entropy(model(image), y), image)

    ratio = in_turns(step(base), step(sparse), rounds, options.device)
    yield "one gradient step, sparsified over base model, resnet18-w16", ratio, f"{len(x)} images, alpha 0.25"


def low_precision(n: int, options: argparse.Namespace) -> Row:
    """A search in float32 over one in bfloat16, the same examples; breaks of both are judged in float32."""
    base, x, y = attack_speed.model_and_images(n, options)
    examples = Examples(x, y, torch.arange(n))
    model = sparsify(base, calibrate(base, [x[:100]]), 0.25)
    searched = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = []
    for precision in ("fp32", "bf16"):
        problem = Problem(
            model, attack_speed.budget_of(options), 10, 0, options.batch_size, precision, search_model=searched
        )  # type: ignore[arg-type]
        run_attack("apgd-margin-30", problem, examples.at(torch.arange(options.batch_size)))
        found.append(run_attack("apgd-ce", problem, examples))
    single, low = found
    left = ", ".join(f"{100 * float((~result.broken).float().mean()):.1f} %" for result in found)
    refused = int(low.rejected.sum()) / max(1, int(low.rejected.sum() + low.broken.sum()))
    return (
        "APGD-CE searched in float32 over searched in bfloat16, resnet18-w16",
        f"{single.seconds / low.seconds:.2f}",
        f"{n} images; left {left}; {100 * refused:.1f} % of the claims in bfloat16 refused",
    )


def workers(stage: str, n: int, data_dir: Path) -> Row:
    """One worker on one core over two workers on two, the whole command with its start and its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    data = ["--model", "resnet18-w16", "--data-dir", str(data_dir), "--run", "r", "--device", "cpu"]
    more = {
        "evaluate": ["--alpha", "0.25", "--attack", "apgd-ce", "--attack", "bpda-apgd-ce", "--no-doubts"],
        "sweep-alpha": ["--alphas", "0.1,0.2,0.3", "--no-racing"],
    }[stage]
    seconds = []
    first, second, *_ = sorted(os.sched_getaffinity(0))
    for cores, jobs in ((f"{first}", "1"), (f"{first},{second}", "2")):
        with tempfile.TemporaryDirectory() as folder:
            command = ["taskset", "-c", cores, sys.executable, "-m", "meansparse_cli", "-q"]

            def typed(*words: str, folder: str = folder, command: list[str] = command) -> float:
                before = time.perf_counter()
                subprocess.run([*command, *words], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
                return time.perf_counter() - before

            typed("calibrate", *data, "--fraction", "0.02")
            seconds.append(
                typed(stage, *data, *more, "--n-examples", str(n), "--batch-size", str(n // 4), "--jobs", jobs)
            )
    one, two = seconds
    return (
        f"one worker on one core over two on two, {stage}",
        f"{one / two:.2f}",
        f"{n} images, {one:.0f} s and {two:.0f} s",
    )


if __name__ == "__main__":
    main()
