"""An evaluation at work: its attacks, its sanity checks, its adversarial examples; see ``evaluate``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..attacks.problem import Budget, Problem
from ..data.examples import Examples
from ..data.splits import Split
from ..diagnostics import DOUBTS_VERSION, Diagnosis, KeptAnswers, diagnose
from ..engine.cells import Cells, FoundImages
from ..engine.comparison import Evaluation
from ..engine.evaluate import EvaluationRun, Plan, evaluate_each_eps
from ..engine.state import StateFolder, eps_state_folder
from ..engine.witnesses import collect_adversarial, save_adversarial, save_external
from ..files import sha256_of
from ..operator.checkpoint import Checkpoint
from ..reporting.console import live, note
from ..reporting.evaluation_tables import show_attacks
from ..runs.context import RunContext
from ..settings.shard import Shard
from ..settings.stages import EvaluateConfig
from ..settings.values import eps_value

Pool = dict[str, FoundImages]
"""Images from elsewhere, by where they are from."""


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked for; ``config`` with every default filled in, ``eps`` one budget or a grid."""

    config: EvaluateConfig
    shard: Shard | None
    alpha: float
    eps: str
    attacks: tuple[str, ...]
    checkpoint: Checkpoint
    images: Split
    pool: Pool
    inputs: dict[str, str]

    @property
    def operator(self) -> str:
        """The operators in words."""
        return self.checkpoint.in_words(self.alpha)


@dataclass(frozen=True)
class Work:
    """``eps`` of ``grid`` is what the report opens with, and that of ``problem``; ``examples`` are on the device."""

    context: RunContext
    asked: Asked
    problem: Problem
    examples: Examples
    grid: tuple[str, ...]
    eps: str
    channels_last: bool

    @property
    def state_folder(self) -> Path:
        """What has been done, by whichever shard."""
        return self.context.whole.paths.state / "evaluate"

    @property
    def statistics_id(self) -> str:
        """What the operators depend on, alpha apart."""
        return sha256_of(self.context.run.paths.statistics) + self.asked.checkpoint.options_id()

    def title(self, part: str = "") -> str:
        """What was evaluated, in words."""
        source, split = self.context.run.source.name, self.asked.config.split
        return f"{source}, {self.asked.operator}, {len(self.examples):,} {split} images{part}"

    def allowed(self, pool: Pool) -> dict[str, int]:
        """How many images of a pool an attacker may use, by where from."""
        cells = Cells(self.problem, self.examples)
        return {name: len(cells.admitted(found)) for name, found in pool.items()}

    def attack(self) -> dict[str, EvaluationRun]:
        """Every attack on every example at every eps; what is on disk is read back."""
        asked, context = self.asked, self.context
        plan = Plan(asked.attacks, asked.alpha, asked.config.individual)
        fingerprint = {
            "weights": str(context.weights_id),
            "statistics": self.statistics_id,
            "split": asked.config.split,
            "dataset": context.named_dataset,
        }
        with live("examples") as view:

            def begin(eps: str, smaller: EvaluationRun | None) -> EvaluationRun:
                problem = replace(self.problem, budget=Budget(self.problem.budget.norm, eps_value(eps)))
                folder = StateFolder(eps_state_folder(self.state_folder, eps, self.grid), fingerprint, asked.shard)
                told = show_attacks(view)
                return EvaluationRun(problem, self.examples, plan, folder, smaller=smaller, on_update=told)

            return evaluate_each_eps(begin, self.grid, asked.pool)

    def diagnose(self, evaluation: Evaluation) -> Diagnosis:
        """The sanity checks on the first examples, and the images that break one on the way."""
        budget, n = self.problem.budget, min(self.asked.config.n_doubt_examples, len(self.examples))
        outcomes = hashlib.sha256(evaluation.outcomes_npz())
        of_what = f"{outcomes.hexdigest()} {self.statistics_id} {self.context.weights_id}"
        key = f"{DOUBTS_VERSION} {of_what} {n} {budget.norm} {budget.eps} {self.problem.seed}"
        first = self.examples.at(torch.arange(n))
        with live("kinds") as view:
            view.begin("doubts", None)

            def on_kind(what: str, done: int, total: int) -> None:
                view.begin(f"doubts: {what}", total, done)

            found = diagnose(
                self.problem,
                first,
                evaluation,
                kept=KeptAnswers(self.state_folder / "doubts", key, note),
                on_kind=on_kind,
            )
        if n_images := sum(len(images) for images in found.images.values()):
            note(
                f"doubts: {n_images:,} images found on the way break an example that withstood the attacks: "
                "they count, as transfer"
            )
        return found

    def save_witnesses(self, runs: dict[str, EvaluationRun]) -> list[Path]:
        """``witnesses.safetensors``, and a ``.pt`` for each model the size of the test set; returns the files."""
        up_to_this = [run for eps, run in runs.items() if eps_value(eps) <= self.problem.budget.eps]
        folder, found_on = self.context.place.paths.folder, collect_adversarial(up_to_this)
        files = [folder / "witnesses.safetensors"]
        save_adversarial(files[0], found_on, up_to_this[-1], self.asked.operator)
        test = self.context.split(self.asked.config.split)
        for name, found in found_on.items():
            file = folder / f"witnesses-{name}.pt"
            if save_external(file, test, found, len(self.examples)):
                files.append(file)
        counts = ", ".join(f"{len(found.images):,} on {name}" for name, found in found_on.items())
        note(f"witnesses: {counts} ({files[0]})")
        return files
