"""What other attacks break of what an evaluation left: how far a short worst case is from a long one.

    python benchmarks/what_is_left.py RUN --name fast --data-dir DIR
    python benchmarks/what_is_left.py RUN --name fast --attack apgd-t --attack bpda

``RUN`` holds an evaluation (``meansparse evaluate --run RUN --name NAME``). The examples that are robust in it face the
attacks (default: ``standard`` and ``bpda``), each on what the ones before have left. A line of JSON an attack goes to
stdout; passes count a backward pass as two. Passes of the evaluation itself come first.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

from meansparse_cli.attacks import expand_attacks
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.data.examples import Examples, stack_examples
from meansparse_cli.data.splits import Subset, load_split
from meansparse_cli.engine.outcomes import MODELS, ModelName, run_order, tried_on
from meansparse_cli.operator.active import set_alpha
from meansparse_cli.runs.device import keep_freed_memory
from meansparse_cli.runs.operators import load_sparsified
from meansparse_cli.settings.values import eps_value


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def arguments(about: str) -> argparse.ArgumentParser:
    """The options that say which evaluation is meant."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", help="of the evaluation; default: the run's own")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-code", action="store_true", help="import the network that RUN names")
    return parser


def survivors(options: argparse.Namespace) -> Iterator[tuple[ModelName, Problem, Examples]]:
    """Each model of an evaluation, and the examples that are robust on it."""
    folder = options.run / "evaluations" / options.name if options.name else options.run
    report = yaml.safe_load((folder / "evaluate.yaml").read_text())
    settings, results = report["config"]["settings"], report["results"]
    outcomes = np.load(folder / "outcomes.npz")
    fetched = yaml.safe_load((options.run / "fetch.yaml").read_text())["results"]["model"]
    images = load_split(settings.get("dataset") or fetched["dataset"], options.data_dir, settings["split"])
    for name in options.model or MODELS:
        alpha = 0.0 if name == "base" else results["alpha"]
        steps = results["attacks"][name]
        say(model=name, evaluation=sum(s["forward_passes"] + 2 * s["backward_passes"] for s in steps))
        model = load_sparsified(options.run, alpha=alpha, device=options.device, allow_code=options.allow_code)
        set_alpha(model, alpha)
        left = outcomes["index"][outcomes[f"{name}_first_broken_by"] < 0]
        x, y = stack_examples(Subset(images.dataset, left.tolist()))
        with torch.no_grad():
            n_classes = model(x[:2].to(options.device)).shape[1]
        budget = Budget(settings["norm"], eps_value(str(settings["eps"])))
        problem = Problem(model, budget, n_classes, settings["seed"], options.batch_size)
        yield name, problem, Examples(x, y, torch.from_numpy(left))


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--attack", action="append")
    options = parser.parse_args()
    keep_freed_memory()
    attacks = run_order(expand_attacks(options.attack or ["standard", "bpda"]))
    for name, problem, examples in survivors(options):
        n_before = len(examples)
        for attack in tried_on(name, attacks):
            found = run_attack(attack, problem, examples)
            passes = int((found.passes * torch.tensor([1, 2])).sum())
            broken = found.broken.cpu()
            say(model=name, attack=attack, faced=len(broken), broken=int(broken.sum()), passes=passes,
                indices=examples.indices[broken].tolist())  # fmt: skip
            examples = examples.at(~broken)
        say(model=name, left=n_before, after=len(examples))


if __name__ == "__main__":
    main()
