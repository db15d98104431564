"""Sanity checks of an evaluation: reasons not to believe it, each with the number behind it. A file a question.

``diagnose``, below, asks all of them. They are from "Evaluating adversarial robustness" (Carlini et al. 2019), what
AutoAttack flags, the indicators of attack failure of Pintor et al. (2022), and what follows from the operator itself.
An image that breaks an example on the way counts in the worst case. In options, reports and state folders the checks
are called ``doubts``.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..attacks.judge import under_attack
from ..attacks.problem import Problem
from ..data.examples import Examples
from ..engine.cells import FoundImages
from ..engine.comparison import Evaluation
from ..engine.outcomes import WORST_CASE, each_model, is_bpda
from ..ledger import Ledger
from ..operator.active import alpha_set
from ..operator.insertion import SparsifiedModel
from .gradients import check_gradients
from .outcomes import check_outcomes
from .outputs import check_outputs
from .search import check_search
from .subject import Diagnostic, Subject

__all__ = ["DIAGNOSTICS_COST", "DOUBTS_VERSION", "Diagnostic", "KeptAnswers", "diagnose"]

DOUBTS_VERSION = 2
"""Raised when a check finds other numbers than before."""
DIAGNOSTICS_COST = 2000
"""Forward passes of all checks, about, an example that survives and a model; a backward pass counted as two."""


def diagnose(
    problem: Problem,
    examples: Examples,
    evaluation: Evaluation,
    *,
    kept: "KeptAnswers | None" = None,
    on_kind: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[list[Diagnostic], dict[str, FoundImages]]:
    """Every check of both models (of the base alone at alpha = 0), in the order of the report; and what they broke.

    ``problem``: as it was evaluated. ``examples``: the first n of ``evaluation``, on the model's device. ``kept``: each
    kind of check is kept there as it ends, and read back. ``on_kind`` is called as each kind begins, with what it is
    of, how many are done and how many there are.
    """
    found: list[Diagnostic] = []
    images: dict[str, FoundImages] = {}
    model = cast(SparsifiedModel, problem.model)
    kinds: dict[str, Callable[[Subject], list[Diagnostic]]] = {  # under the names that state folders know
        "outputs": check_outputs,
        "gradients": check_gradients,
        "outcomes": lambda subject: check_outcomes(subject, evaluation),
        "search": check_search,
    }
    alphas = each_model(evaluation.alpha)
    for m, (name, alpha) in enumerate(alphas.items()):
        with under_attack(model), alpha_set(model, alpha):
            robust = evaluation.robust(name, WORST_CASE)
            assert robust is not None  # what every attack has been given is known
            right, withstood = (
                torch.from_numpy(mask[: len(examples)].copy()).to(examples.x.device)
                for mask in (evaluation.outcomes(name).correct, robust)
            )
            bpda = any(is_bpda(attack) for attack in evaluation.attacks)
            subject = Subject(name, problem, examples, right, withstood, bpda)
            for k, (kind, check) in enumerate(kinds.items()):
                on_kind(f"{kind} of {name}", m * len(kinds) + k, len(alphas) * len(kinds))
                found += check(subject) if kept is None else kept.once(kind, subject, check)
        if any(len(rows) for rows, _ in subject.broken_by):
            images[f"doubts of {name}"] = _as_pool(subject.broken_by)
    return found, images


def _as_pool(broken_by: Sequence[tuple[Tensor, Tensor]]) -> FoundImages:
    """The first image of each position, in order."""
    first: dict[int, Tensor] = {}
    for rows, images in reversed(broken_by):
        first |= dict(zip(rows.flip(0).tolist(), images.flip(0), strict=True))
    return FoundImages(torch.tensor(sorted(first)), torch.stack([first[row] for row in sorted(first)]))


class KeptAnswers:
    """Answers that outlive a kill: in ``folder``, a folder for each ``key``, all that they depend on."""

    def __init__(self, folder: Path, key: str, note: Callable[[str], None] | None = None) -> None:
        # below a folder of its own: two folders below an evaluation's state, every file is taken for outcomes
        self.ledger = Ledger(folder / "answers", {"key": key}, on_change="beside", note=note)

    def once(self, kind: str, subject: Subject, check: Callable[[Subject], list[Diagnostic]]) -> list[Diagnostic]:
        """What was found before, with the images that broke an example; or what ``check`` finds now."""
        name = f"{subject.name}-{kind}"
        state = self.ledger.get(name)
        if state is None:
            n_before = len(subject.broken_by)
            found = check(subject)
            pairs = [{"rows": rows, "images": images} for rows, images in subject.broken_by[n_before:]]
            self.ledger.put(name, {"doubts": [asdict(one) for one in found], "broken_by": pairs})
            return found
        subject.broken_by.extend((pair["rows"], pair["images"]) for pair in state["broken_by"])
        return [Diagnostic(**one) for one in state["doubts"]]
