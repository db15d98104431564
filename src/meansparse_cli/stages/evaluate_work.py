"""An evaluation at work: its attacks, its sanity checks, its witnesses; see ``evaluate``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..attacks.problem import Problem
from ..attacks.result import Budget
from ..data.examples import Examples
from ..data.splits import Split
from ..diagnostics import DOUBTS_VERSION, Diagnosis, KeptAnswers, diagnose
from ..engine.eps_sweep import eps_state_folder, evaluate_each_eps
from ..engine.evaluate import EvaluateSettings, evaluate_robustness
from ..engine.evaluation import Evaluation
from ..engine.pool import admissible
from ..engine.state import Chunk
from ..engine.witnesses import collect_witnesses, save_external, save_witnesses
from ..files import sha256_of
from ..operator.checkpoint import Checkpoint
from ..operator.insertion import SparsifiedModel
from ..reporting.console import live, note
from ..reporting.progress import show_attacks
from ..runs.context import RunContext
from ..settings.shard import Shard
from ..settings.stages import EvaluateConfig
from ..settings.values import eps_value

Pool = dict[str, Chunk]
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
    """``eps`` of ``grid`` is what the report opens with, and that of ``settings``; ``examples`` are on the device."""

    context: RunContext
    asked: Asked
    model: SparsifiedModel
    n_classes: int
    examples: Examples
    settings: EvaluateSettings
    grid: tuple[str, ...]
    eps: str

    @property
    def state_folder(self) -> Path:
        """What has been done, by whichever shard."""
        return self.context.whole.paths.state / "evaluate"

    @property
    def budget(self) -> Budget:
        """That of ``eps``."""
        return Budget(self.settings.norm, self.settings.eps)

    @property
    def statistics_id(self) -> str:
        """What the operators depend on, alpha apart."""
        return sha256_of(self.context.run.paths.statistics) + self.asked.checkpoint.options_id()

    def title(self, part: str = "") -> str:
        """What was evaluated, in words."""
        source, split = self.context.run.source.name, self.asked.config.split
        return f"{source}, {self.asked.operator}, {len(self.examples):,} {split} images{part}"

    def allowed(self, pool: Pool) -> Pool:
        """The images of a pool that an attacker may use."""
        return {name: admissible(chunk, self.examples.x, self.budget) for name, chunk in pool.items()}

    def attack(self, pool: Pool) -> dict[str, Evaluation]:
        """Every attack on every example at every eps; what is on disk is read back."""
        asked, context, examples = self.asked, self.context, self.examples
        fingerprint = {
            "weights": str(context.weights_id),
            "statistics": self.statistics_id,
            "split": asked.config.split,
            "dataset": context.named_dataset,
        }
        with live("examples") as view:

            def evaluate_one(eps: str, smaller: Evaluation | None) -> Evaluation:
                return evaluate_robustness(
                    self.model,
                    examples.x,
                    examples.y,
                    examples.indices,
                    alpha=asked.alpha,
                    settings=replace(self.settings, eps=eps_value(eps)),
                    state_folder=eps_state_folder(self.state_folder, eps, self.grid),
                    fingerprint=fingerprint,
                    n_classes=self.n_classes,
                    on_update=show_attacks(view),
                    smaller=smaller,
                    pool=pool,
                    shard=asked.shard,
                )

            return evaluate_each_eps(evaluate_one, self.grid)

    def diagnose(self, evaluation: Evaluation) -> Diagnosis:
        """What a sceptical reader asks of the first examples, and the images that break one on the way."""
        settings = self.settings
        outcomes, n = (
            hashlib.sha256(evaluation.outcomes_npz()),
            min(self.asked.config.n_doubt_examples, len(self.examples)),
        )
        of_what = f"{outcomes.hexdigest()} {self.statistics_id} {self.context.weights_id}"
        key = f"{DOUBTS_VERSION} {of_what} {n} {settings.norm} {settings.eps} {settings.seed}"
        first = self.examples.at(torch.arange(n))
        with live("kinds") as view:
            view.begin("doubts", None)

            def on_kind(what: str, done: int, total: int) -> None:
                view.begin(f"doubts: {what}", total, done)

            found = diagnose(
                Problem(self.model, self.budget, self.n_classes, settings.seed, settings.batch_size),
                first,
                evaluation,
                kept=KeptAnswers(self.state_folder / "doubts", key, note),
                on_kind=on_kind,
            )
        if n_images := sum(len(chunk.positions) for chunk in found.images.values()):
            note(
                f"doubts: {n_images:,} images found on the way break an example that withstood the attacks: "
                "they count, as transfer"
            )
        return found

    def save_witnesses(self, evaluation: Evaluation, pool: Pool) -> list[Path]:
        """``witnesses.safetensors``, and a ``.pt`` for each model the size of the test set; returns the files."""
        settings, examples, folder = self.settings, self.examples, self.context.place.paths.folder
        up_to_this = [one for one in self.grid if eps_value(one) <= settings.eps]
        folders = [eps_state_folder(self.state_folder, one, self.grid) for one in up_to_this]
        witnesses = collect_witnesses(self.model, examples.x, examples.y, evaluation, folders, settings, pool)
        files = [folder / "witnesses.safetensors"]
        save_witnesses(
            files[0],
            witnesses,
            examples.indices,
            norm=settings.norm,
            eps=settings.eps,
            alpha=evaluation.alpha,
            operator=self.asked.operator,
        )
        test = self.context.split(self.asked.config.split)
        for name, found in witnesses.items():
            file = folder / f"witnesses-{name}.pt"
            if save_external(file, test, found, len(examples)):
                files.append(file)
        counts = ", ".join(f"{len(found.images):,} on {name}" for name, found in witnesses.items())
        note(f"witnesses: {counts} ({files[0]})")
        return files
