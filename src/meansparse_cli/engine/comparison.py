"""The result of an evaluation: both models compared, and the report and the file made of it."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.facts import KNOWN_DATASETS
from ..stats.paired import Accuracy, PairedDifference, accuracy_of, paired_difference
from ..stats.verdict import Verdict, verdict
from .outcomes import (
    CLEAN,
    MODELS,
    PLAIN,
    TRANSFER,
    WORST_CASE,
    ModelName,
    ModelOutcomes,
    Spent,
    attack_groups,
    attack_version,
    is_bpda,
)


@dataclass(frozen=True)
class Comparison:
    """Both models on the same examples, each at its worst over ``attacks`` (none: the clean images)."""

    name: str
    attacks: tuple[str, ...]
    base: Accuracy
    sparsified: Accuracy
    gain: PairedDifference

    def to_report(self) -> dict[str, Any]:
        low, high = self.gain.interval_95
        return {
            "name": self.name,
            "attacks": list(self.attacks),
            "base_accuracy": self.base.fraction,
            "base_standard_error": self.base.standard_error,
            "sparsified_accuracy": self.sparsified.fraction,
            "sparsified_standard_error": self.sparsified.standard_error,
            "sparsified_minus_base": self.gain.difference,
            "sparsified_minus_base_standard_error": self.gain.standard_error,
            "sparsified_minus_base_interval_95": [low, high],
            "gained": self.gain.gained,
            "lost": self.gain.lost,
        }


@dataclass(frozen=True)
class AttackStep:
    """One attack on one model, in the order they ran. ``robust``: worst case over this attack and all before it;
    ``n_new``: how many it broke that nothing before it had.
    """

    attack: str
    n_faced: int
    n_broken: int
    n_new: int
    robust: Accuracy
    spent: Spent


@dataclass(frozen=True)
class Evaluation:
    """n examples under every attack, on the base and on the sparsified model.

    ``attacks``: in the order they ran, plain ones first. ``indices`` (n,): positions in the data set; ``labels`` (n,).
    """

    alpha: float
    attacks: tuple[str, ...]
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    base: ModelOutcomes
    sparsified: ModelOutcomes
    about: str = ""
    """A digest of images and budget, where somebody noted it."""

    @property
    def comparisons(self) -> list[Comparison]:
        """``clean``, every group of attacks whose worst case is known for both models, ``worst case`` last."""
        found = []
        for name, attacks in attack_groups(self.attacks).items():
            base, sparsified = self.base.robust_to(attacks), self.sparsified.robust_to(attacks)
            if base is not None and sparsified is not None:
                gain = paired_difference(sparsified, base)
                found.append(Comparison(name, attacks, accuracy_of(base), accuracy_of(sparsified), gain))
        return found

    def comparison(self, name: str) -> Comparison:
        """The one called ``name``; there are always ``clean`` and ``worst case``, at times ``plain attacks``."""
        return next(found for found in self.comparisons if found.name == name)

    @property
    def verdict(self) -> Verdict:
        """In words; see ``stats.verdict`` for the rule."""
        if not self.alpha:
            return Verdict(
                "no difference", "alpha is 0, where the two models are one: no number of examples would tell them apart"
            )
        of_bpda = [is_bpda(name) for name in self.attacks]
        # without a plain attack there is no plain gain that BPDA could remove
        groups = {"plain": WORST_CASE if all(of_bpda) else PLAIN, "worst": WORST_CASE}
        outcomes = {f"{model}_{key}": self.robust(model, group) for model in MODELS for key, group in groups.items()}
        return verdict(**outcomes, bpda_was_run=any(of_bpda), plain_was_run=not all(of_bpda))  # type: ignore[arg-type]

    def outcomes(self, model: ModelName) -> ModelOutcomes:
        return self.base if model == "base" else self.sparsified

    def robust(self, model: ModelName, group: str) -> NDArray[np.bool_] | None:
        """(n,) bool: in the worst case over a group of attacks; None where that is not known, or none of it ran."""
        attacks = attack_groups(self.attacks).get(group)
        return None if attacks is None else self.outcomes(model).robust_to(attacks)

    def steps(self, model: ModelName) -> list[AttackStep]:
        """The attacks on one model in order, ``transfer`` last, with what was left after each."""
        outcomes, robust, steps = self.outcomes(model), self.outcomes(model).correct.copy(), []
        for attack in (*self.attacks, TRANSFER):
            n_new = int((robust & outcomes.broken[attack]).sum())
            robust = robust & ~outcomes.broken[attack]
            n_faced, n_broken = int(outcomes.faced[attack].sum()), int(outcomes.broken[attack].sum())
            steps.append(AttackStep(attack, n_faced, n_broken, n_new, accuracy_of(robust), outcomes.spent[attack]))
        return steps

    def first_broken_by(self, model: ModelName) -> NDArray[np.int16]:
        """(n,) int16: what broke the example first, of ``clean``, the attacks in order, ``transfer``; -1: nothing."""
        outcomes = self.outcomes(model)
        first = np.full(len(self.labels), -1, dtype=np.int16)
        for code, attack in reversed(list(enumerate((*self.attacks, TRANSFER), start=1))):
            first[outcomes.broken[attack]] = code
        first[~outcomes.correct] = 0
        return first

    def to_report(self) -> dict[str, Any]:
        """Plain values for YAML. Accuracies are fractions; only ``seconds`` differs between equal runs."""
        found = self.verdict
        return {
            "alpha": self.alpha,
            "n_examples": len(self.labels),
            "verdict": found.name,
            "reason": found.reason,
            "comparisons": [comparison.to_report() for comparison in self.comparisons],
            "attacks": {model: [_step_to_report(step) for step in self.steps(model)] for model in MODELS},
            "counts": self.counts(),
            "seconds": {m: {step.attack: round(step.spent.seconds, 3) for step in self.steps(m)} for m in MODELS},
        }

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts that ought to be small, a model each."""
        counts: dict[str, dict[str, int]] = {}
        names = (CLEAN, *self.attacks, TRANSFER)
        for model in MODELS:
            steps, firsts = self.steps(model), [names[code] for code in self.first_broken_by(model) if code > 0]
            of_model = {
                "claims_rejected": sum(step.spent.rejected for step in steps),
                "breaks_unconfirmed": sum(step.spent.unconfirmed for step in steps),
                "first_broken_by_square": firsts.count("square"),
                "first_broken_by_bpda": sum(is_bpda(name) for name in firsts),
                "first_broken_by_transfer": firsts.count(TRANSFER),
                "misclassified_clean": int((~self.outcomes(model).correct).sum()),
            }
            for name, n in of_model.items():
                counts.setdefault(name, {})[model] = n
        return counts

    def outcomes_npz(self) -> bytes:
        """Every per-example outcome as a compressed ``.npz``; equal outcomes give equal bytes.

        ``index``, ``label`` (n,); ``name``: clean, the attacks in order, transfer; per model
        ``<model>_first_broken_by`` (n,), a position in ``name`` or -1 = robust; ``<model>_outcome`` (n, names) int8: 0
        withstood, 1 broken, -1 not tried.
        """
        arrays: dict[str, NDArray[Any]] = {
            "index": self.indices,
            "label": self.labels,
            "name": np.array([CLEAN, *self.attacks, TRANSFER]),
        }
        for model in MODELS:
            outcomes = self.outcomes(model)
            columns = [(~outcomes.correct).astype(np.int8)]
            for attack in (*self.attacks, TRANSFER):
                columns.append(np.where(outcomes.faced[attack], outcomes.broken[attack].astype(np.int8), np.int8(-1)))
            arrays[f"{model}_first_broken_by"] = self.first_broken_by(model)
            arrays[f"{model}_outcome"] = np.stack(columns, axis=1)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()


def _mean(n: int, forward: int, backward: int) -> dict[str, float] | None:
    """Passes of the search, a mean over n examples."""
    return {"forward": round(forward / n, 1), "backward": round(backward / n, 1)} if n else None


def _step_to_report(step: AttackStep) -> dict[str, Any]:
    spent = step.spent
    n, forward, backward = spent.n_attacked_broken, spent.forward_passes_broken, spent.backward_passes_broken
    return {
        "attack": step.attack,
        "implementation": attack_version(step.attack),
        "n_faced": step.n_faced,
        "n_broken": step.n_broken,
        "n_broken_that_nothing_before_had": step.n_new,
        "robust_accuracy_so_far": step.robust.fraction,
        "robust_standard_error_so_far": step.robust.standard_error,
        "forward_passes": spent.forward_passes,
        "backward_passes": spent.backward_passes,
        "passes_a_broken_example": _mean(n, forward, backward),
        "passes_a_robust_example": _mean(
            spent.n_attacked - n, spent.forward_passes - forward, spent.backward_passes - backward
        ),
        "rejected": spent.rejected,
        "unconfirmed": spent.unconfirmed,
    }


def eps_rows(evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """For the report: one row an eps, fractions."""
    rows = []
    for eps, evaluation in evaluations.items():
        worst = evaluation.comparison(WORST_CASE).to_report()
        row = {"eps": eps} | {key: value for key, value in worst.items() if key != "attacks"}
        for plain in (found for found in evaluation.comparisons if found.name == PLAIN):
            row |= {f"{model}_{PLAIN.replace(' ', '_')}_accuracy": getattr(plain, model).fraction for model in MODELS}
        rows.append(row | {"verdict": evaluation.verdict.name})
    return rows


def headline_eps(grid: Sequence[str], dataset: str, norm: str) -> str:
    """The eps whose evaluation the report opens with: the data set's own where it is in the grid, else the largest."""
    facts = KNOWN_DATASETS.get(dataset)
    own = facts.eps.get(norm) if facts is not None else None
    same = [eps for eps in grid if own is not None and Fraction(eps) == Fraction(own)]
    return same[0] if same else grid[-1]
