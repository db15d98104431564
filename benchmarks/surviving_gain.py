"""Is there an operator whose gain survives the worst case? A search over many, then one confirmation.

    python benchmarks/surviving_gain.py explore RUN --eps 2/255 --data-dir DIR -o OUT
    python benchmarks/surviving_gain.py register OUT                OUT/explored.jsonl -> OUT/candidates.yaml
    python benchmarks/surviving_gain.py confirm OUT --data-dir DIR [--attack full --top 1 --n-examples 1000]
    python benchmarks/surviving_gain.py press OUT --data-dir DIR    longer attacks on what was left
    python benchmarks/surviving_gain.py page OUT...                 Markdown rows of all that was confirmed

``RUN`` is a calibrated run folder. A candidate is an operator (shape, centre, spread), the images of its statistics,
the sites and alpha. ``explore`` looks at held-out images in three parts; who comes to a later part was among the best
of the one before, by the difference of worst cases. ``register`` writes the best of the last part into a file and
prints its sha256; only that file is confirmed, once, on test images. All goes through ``meansparse measure``: killed,
the same command goes on. ``press``: examples that only one of the two models withstood in the confirmation face the
preset ``full`` and attacks from more starts and through softer bands, on the model that withstood; with
``--everywhere`` all that either withstood face the gradient attacks among these.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.stats import norm
from typer.testing import CliRunner

from meansparse_cli import load_sparsified
from meansparse_cli.attacks import expand_attacks
from meansparse_cli.attacks.judge import under_attack
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.cli import app
from meansparse_cli.data.examples import Examples, stack_examples
from meansparse_cli.data.splits import Subset, load_split
from meansparse_cli.operator.checkpoint import load_checkpoint, sparsify
from meansparse_cli.operator.insertion import SparsifiedModel, remove
from meansparse_cli.operator.shapes import HARD, SHAPES
from meansparse_cli.runs.operators import with_options
from meansparse_cli.settings.stages import OPERATOR_OPTIONS, EvaluateConfig
from meansparse_cli.settings.values import eps_value
from meansparse_cli.sites.rules import select_sites
from meansparse_cli.stats.paired import PairedDifference, interval_of, paired_difference
from meansparse_cli.training.attack import LinfAscent, cross_entropy, uniform_start

ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5)
FORMS = (
    ("channel-mean", "channel-std"),
    ("zero", "channel-std"),
    ("global-mean", "channel-std"),
    ("channel-mean", "site-std"),
)
SCREEN = ("apgd-margin-10", "soft-0.05-apgd-margin-15")
PARTS = ((200, SCREEN, None), (600, SCREEN, 80), (2000, ("fast",), 8))
"""Held-out images so far, the attacks, how many candidates get there."""
N_REGISTERED = 2
N_TEST = 5000
PRESS = ("soft-0.2-cosine-margin-6x80", "soft-0.5-cosine-margin-6x80", "bpda-cosine-margin-6x80", "soft-1-apgd-ce")
RESTARTED, SEEDS = ("bpda-apgd-dlr", "base-gradient-apgd-dlr", "soft-0.05-apgd-dlr", "bpda-apgd-ce"), range(2, 13)
SLOW = ("adaptive-1-1", "adaptive-2-2", "apgd-t", "bpda-apgd-t", "fab-t", "square")
LEVEL = 0.05


@dataclass(frozen=True)
class Candidate:
    """``run``: the folder of its statistics; those of adversarial images are in ``RUN-adversarial``."""

    run: str
    shape: str
    centre: str
    spread: str
    sites: str
    alpha: float

    @property
    def group(self) -> tuple[str, str, str, str]:
        """Candidates of one group are variants of one model."""
        return self.run, self.shape, self.centre, self.spread


def cli(*arguments: object) -> None:
    print("meansparse", *arguments, file=sys.stderr, flush=True)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code:
        raise SystemExit(f"exit code {result.exit_code}\n{result.output}")


def rules_of(run: Path) -> list[str]:
    """Everywhere, each half, and up to four sites alone, evenly spaced."""
    sites = load_checkpoint(run / "statistics.safetensors").sites
    n = len(sites)
    singles = [f"single:{round(i * (n - 1) / 3)}" for i in range(4)]
    rules = ["all", f"first:{(n + 1) // 2}", f"last:{n // 2}", *singles]
    chosen = {tuple(site.index for site in select_sites(sites, rule)): rule for rule in reversed(rules)}
    return list(reversed(chosen.values()))


def candidates_of(run: Path) -> list[Candidate]:
    """Every shape in every form on clean statistics; on adversarial ones in the paper's form."""
    found = []
    for shape in (HARD, *SHAPES):
        runs = [(str(run), form) for form in FORMS] + [(f"{run}-adversarial", FORMS[0])]
        for where, (centre, spread) in runs:
            found += [Candidate(where, shape, centre, spread, rule, a) for rule in rules_of(run) for a in ALPHAS]
    return found


def measured(
    candidates: Sequence[Candidate], name: str, rest: Sequence[object]
) -> Iterator[tuple[Candidate, dict[str, np.ndarray]]]:
    """Each candidate with its outcomes and its base's, (n,) bool, of one call for each group and rule."""
    calls: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        calls[(*candidate.group, candidate.sites)].append(candidate)
    by_alphas: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for key, members in calls.items():
        by_alphas[(key[:4], tuple(member.alpha for member in members))].append(key[4])
    for ((run, shape, centre, spread), alphas), rules in by_alphas.items():
        label = f"{name}-{shape}-{centre}-{spread}"
        operator = ("--shape", shape, "--centre", centre, "--spread", spread, "--alphas", ",".join(map(str, alphas)))
        sites = [word for rule in rules for word in ("--sites", rule)]
        cli("measure", "--run", run, "--name", label, *operator, *sites, *rest)
        folder = Path(run) / "measurements" / label
        rows = yaml.safe_load((folder / "measure.yaml").read_text())["results"]["rows"]
        with np.load(folder / "outcomes.npz") as arrays:
            clean, plain, worst, index = (arrays[name] for name in ("clean", "plain", "worst", "index"))
        for i, row in enumerate(rows[1:], start=1):
            own = {"clean": clean[i], "plain": plain[i], "worst": worst[i]}
            base = {"base_clean": clean[0], "base_plain": plain[0], "base_worst": worst[0]}
            yield Candidate(run, shape, centre, spread, row["sites"], row["alpha"]), own | base | {"index": index}


def summary_of(candidate: Candidate, outcomes: dict[str, np.ndarray], images: slice) -> dict[str, Any]:
    some = {name: values[images] for name, values in outcomes.items()}
    facts: dict[str, Any] = {name: float(values.mean()) for name, values in some.items() if name != "index"}
    for measure in ("clean", "plain", "worst"):
        facts[f"{measure}_gain"] = asdict(paired_difference(some[measure], some[f"base_{measure}"]))
    return asdict(candidate) | facts


def adversarial_run(run: Path, eps: float, data_dir: Path) -> Path:
    """``RUN-adversarial``: the same model with statistics of its own adversarial calibration images (PGD, 10 steps)."""
    there, data = Path(f"{run}-adversarial"), Path(f"{run}-adversarial-data")
    if (there / "calibrate.yaml").exists():
        return there
    model = load_sparsified(run, alpha=0.0, allow_code=True)
    x, y = stack_examples(load_split("cifar10", data_dir, "calibration"))
    ascent, generator = LinfAscent(model, cross_entropy, eps, eps / 4, 10), torch.Generator().manual_seed(0)
    with under_attack(model):
        parts = zip(x.split(250), y.split(250), strict=True)
        found = torch.cat([ascent(part, labels, uniform_start(part, eps, generator)) for part, labels in parts])
    data.mkdir(parents=True, exist_ok=True)
    pixels = (found * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for part in ("train", "test"):  # a tenth of the first is held out again, which nothing here looks at
        np.savez(
            data / f"{part}.npz", x=pixels[: None if part == "train" else 10], y=y[: None if part == "train" else 10]
        )
    fetched = yaml.safe_load((run / "fetch.yaml").read_text())["config"]["settings"]
    weights = ("--weights", fetched["weights"]) if fetched["weights"] else ()
    cli("fetch", "--model", fetched["model"], "--dataset", "cifar10", *weights, "--run", there)
    cli("calibrate", "--run", there, "--data-dir", data)
    return there


def explore(options: argparse.Namespace) -> None:
    adversarial_run(options.run, eps_value(options.eps), options.data_dir)
    options.out.mkdir(parents=True, exist_ok=True)
    left, before, found = candidates_of(options.run), 0, dict[Candidate, tuple[float, float]]()
    with (options.out / "explored.jsonl").open("w") as file:
        for part, (n, attacks, n_left) in enumerate(PARTS, start=1):
            if n_left is not None:
                left = best_of(found, n_left)
            rest = ["--split", "held-out", "--eps", options.eps, "--data-dir", options.data_dir, "--allow-code"]
            rest += ["--n-examples", n, "--block-size", 200, *(word for one in attacks for word in ("--attack", one))]
            found = {}
            for candidate, outcomes in measured(left, f"explore-{'-'.join(attacks)}", rest):
                facts = summary_of(candidate, outcomes, slice(before, n))
                found[candidate] = facts["worst_gain"]["difference"], facts["clean_gain"]["difference"]
                print(json.dumps({"part": part, "eps": options.eps, **facts}), file=file, flush=True)
            before = n


def best_of(found: dict[Candidate, tuple[float, float]], n: int) -> list[Candidate]:
    """Those of the largest gains; between equals the one that does more, for one that changes nothing cannot gain."""
    return sorted(found, key=lambda one: (*found[one], one.alpha), reverse=True)[:n]


def register(options: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in (options.out / "explored.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["part"] == len(PARTS)]
    chosen, alike = list[dict[str, Any]](), set[str]()  # behind a ReLU some operators are one
    for row in sorted(last, key=lambda row: -row["worst_gain"]["difference"]):
        outcomes = json.dumps([row[key] for key in sorted(row) if key.endswith("_gain")])
        if outcomes not in alike and len(chosen) < N_REGISTERED:
            alike.add(outcomes)
            chosen.append({name: row[name] for name in (*Candidate.__dataclass_fields__, "eps")})
    file = options.out / "candidates.yaml"
    file.write_text(yaml.safe_dump(chosen, sort_keys=False))
    print(file, hashlib.sha256(file.read_bytes()).hexdigest())


def confirm(options: argparse.Namespace) -> None:
    results = [with_halves(*found) for found in confirmed(options)]
    write_confirmed(options.out, options.attack, results)


def confirmed(options: argparse.Namespace) -> Iterator[tuple[Candidate, dict[str, np.ndarray], str]]:
    """Each registered candidate, its outcomes on test images, its eps."""
    for row in yaml.safe_load((options.out / "candidates.yaml").read_text())[: options.top]:
        eps = row.pop("eps")
        rest = ["--eps", eps, "--data-dir", options.data_dir, "--allow-code", "--n-examples", options.n_examples]
        rest += ["--block-size", 500, "--attack", options.attack]
        for candidate, outcomes in measured([Candidate(**row)], f"confirm-{options.attack}", rest):
            yield candidate, outcomes, eps


def with_halves(candidate: Candidate, outcomes: dict[str, np.ndarray], eps: str) -> dict[str, Any]:
    n = len(outcomes["clean"])
    halves = [summary_of(candidate, outcomes, half)["worst_gain"] for half in (slice(0, n // 2), slice(n // 2, n))]
    return summary_of(candidate, outcomes, slice(0, n)) | {"eps": eps, "halves": halves}


def write_confirmed(out: Path, attack: str, results: list[dict[str, Any]]) -> None:
    digest = hashlib.sha256((out / "candidates.yaml").read_bytes()).hexdigest()
    file = out / f"confirmed-{attack.replace(' ', '-')}.yaml"
    file.write_text(yaml.safe_dump({"registered": digest, "attack": attack, "results": results}, sort_keys=False))
    print(file)


def press(options: argparse.Namespace) -> None:
    dataset, results = load_split("cifar10", options.data_dir, "test").dataset, list[dict[str, Any]]()
    attacks = [name for name in expand_attacks(("full", *PRESS)) if not options.everywhere or name not in SLOW]
    for candidate, outcomes, eps in confirmed(options):
        model = sparsified(candidate)
        tries = [(1, attack) for attack in attacks]
        if not options.everywhere:
            tries += [(seed, attack) for seed in SEEDS for attack in RESTARTED]
        for mine, other, alpha in (("worst", "base_worst", candidate.alpha), ("base_worst", "worst", 0.0)):
            differs = outcomes[mine] & ~outcomes[other]
            rows = np.flatnonzero(outcomes[mine] if options.everywhere else differs)
            for seed, attack in tries if len(rows) else ():
                problem = Problem(model, Budget("Linf", eps_value(eps)), 10, seed, 250, "fp32")
                x, y = stack_examples(Subset(dataset, outcomes["index"][rows].tolist()))
                variant = torch.full((len(model.sites),), alpha)
                broken = run_attack(attack, problem, Examples(x, y, torch.from_numpy(rows)), variant).broken.numpy()
                print(candidate, mine, attack, int(broken.sum()), "of", len(rows), file=sys.stderr, flush=True)
                outcomes[mine][rows[broken]] = False
                rows = rows[~broken]
                if not len(rows):
                    break
        results.append(with_halves(candidate, outcomes, eps))
    write_confirmed(options.out, "pressed everywhere" if options.everywhere else "pressed", results)


def sparsified(candidate: Candidate) -> SparsifiedModel:
    statistics = load_checkpoint(Path(candidate.run) / "statistics.safetensors")
    options: Any = {name: getattr(candidate, name) for name in OPERATOR_OPTIONS}
    base = remove(load_sparsified(candidate.run, alpha=0.0, allow_code=True))
    return sparsify(base, with_options(statistics, EvaluateConfig(**options)), alpha=candidate.alpha)


def page(options: argparse.Namespace) -> None:
    files = [file for out in options.out for file in sorted(out.glob("confirmed-*.yaml"))]
    n_registered = sum(len(yaml.safe_load((out / "candidates.yaml").read_text())) for out in options.out)
    z = float(norm.isf(LEVEL / 2 / n_registered))
    for held in (yaml.safe_load(file.read_text()) for file in files):
        for row in held["results"]:
            clean, plain, worst = (PairedDifference(**row[f"{name}_gain"]) for name in ("clean", "plain", "worst"))
            low, high = interval_of(worst.gained - worst.lost, worst.gained + worst.lost, worst.n, z)
            seen = (z + norm.ppf(0.8)) * max(worst.standard_error, (high - low) / 2 / z)
            statistics = "adversarial" if row["run"].endswith("-adversarial") else "clean"
            cells = [Path(row["run"]).name.removesuffix("-adversarial"), held["attack"], row["shape"], row["centre"]]
            cells += [row["spread"], statistics, row["sites"], f"{row['alpha']:g}", f"{100 * row['base_worst']:.2f}"]
            cells += [str(clean), str(plain), str(worst), f"{100 * low:+.2f} to {100 * high:+.2f}", f"{100 * seen:.2f}"]
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("explore")
    one.add_argument("run", type=Path)
    one.add_argument("--eps", required=True)
    one.add_argument("-o", "--out", type=Path, required=True)
    one.set_defaults(run_it=explore)
    two = commands.add_parser("register")
    two.add_argument("out", type=Path)
    two.set_defaults(run_it=register)
    three = commands.add_parser("confirm")
    three.add_argument("out", type=Path)
    three.add_argument("--attack", default="fast")
    three.add_argument("--top", type=int, help="the first so many of the candidates")
    three.add_argument("--n-examples", type=int, default=N_TEST)
    three.set_defaults(run_it=confirm)
    five = commands.add_parser("press")
    five.add_argument("out", type=Path)
    five.add_argument("--everywhere", action="store_true")
    five.set_defaults(run_it=press, attack="fast", top=None, n_examples=N_TEST)
    for sub in (one, three, five):
        sub.add_argument("--data-dir", type=Path, required=True)
    four = commands.add_parser("page")
    four.add_argument("out", type=Path, nargs="+")
    four.set_defaults(run_it=page)
    options = parser.parse_args()
    options.run_it(options)


if __name__ == "__main__":
    main()
