"""Reasons not to believe an evaluation, each checked and put beside the number behind it.

What a sceptical reader asks for after "Evaluating adversarial robustness" (Carlini et al. 2019), what AutoAttack flags, and
the indicators of attack failure of Pintor et al. (2022), besides what follows from the operator itself: what it masks,
and where its gradient points. The limits stand beside the checks. A doubt that warns does not change a number; it says
which number not to build on.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..artifacts import write_bytes
from ..attacks.judge import under_attack
from ..attacks.result import Budget
from ..evaluation import MODELS, WORST_CASE, Evaluation, attack_groups, is_bpda
from ..sparsify import SparsifiedModel, alpha_set
from .doubt import Doubt, Subject
from .gradients import doubt_gradients
from .outcomes import doubt_outcomes
from .outputs import doubt_outputs
from .search import doubt_search

__all__ = ["DOUBTS_VERSION", "Doubt", "find_doubts"]

DOUBTS_VERSION = 1
"""Raised when a check finds other numbers than before."""


def find_doubts(
    model: SparsifiedModel,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    evaluation: Evaluation,
    *,
    budget: Budget,
    seed: int,
    batch_size: int,
    n_classes: int,
    state_folder: Path | None = None,
    key: str = "",
    on_kind: Callable[[str, int, int], None] | None = None,
) -> list[Doubt]:
    """Every doubt about both models (about the base alone at alpha = 0), in the order of the report.

    ``x`` (n, channels, height, width) float32 in [0, 1], ``y`` and ``indices`` (n,): the first n examples of
    ``evaluation``, on the model's device. ``on_kind`` is called as each kind of check begins, with what it is of, how many
    are done and how many there are. Each kind is kept in ``state_folder`` as it ends and read back under the same ``key``.
    Nothing is left changed on the model. Costs about 2,000 forward passes an example that survives, a backward pass
    counted as two.
    """
    worst = attack_groups(evaluation.attacks)[WORST_CASE]
    bpda, doubts = any(is_bpda(attack) for attack in evaluation.attacks), list[Doubt]()
    kinds: tuple[tuple[str, Callable[[Subject], list[Doubt]]], ...] = (
        ("outputs", doubt_outputs),
        ("gradients", doubt_gradients),
        ("outcomes", lambda subject: doubt_outcomes(subject, evaluation)),
        ("search", doubt_search),
    )
    names = MODELS if evaluation.alpha else MODELS[:1]
    for m, name in enumerate(names):
        outcomes = evaluation.outcomes(name)
        robust = outcomes.robust_to(worst)
        assert robust is not None  # what every attack has been given is known
        with under_attack(model), alpha_set(model, evaluation.alpha if name == "sparsified" else 0.0):
            subject = Subject(
                name, model, x, y.long(), indices.cpu(),
                torch.from_numpy(outcomes.correct[: len(y)].copy()).to(x.device),
                torch.from_numpy(robust[: len(y)].copy()).to(x.device),
                bpda, budget, seed, batch_size, n_classes,
            )  # fmt: skip
            for k, (kind, find) in enumerate(kinds):
                if on_kind is not None:
                    on_kind(f"{kind} of {name}", m * len(kinds) + k, len(names) * len(kinds))
                file = None if state_folder is None else state_folder / f"{name}-{kind}.json"
                found = None if file is None else _kept(file, key)
                if found is None:
                    found = find(subject)
                    if file is not None:
                        content = {"key": key, "doubts": [asdict(doubt) for doubt in found]}
                        write_bytes(file, json.dumps(content).encode())
                doubts += found
    return doubts


def _kept(file: Path, key: str) -> list[Doubt] | None:
    """What an earlier session found; None where that is not there, or of something else."""
    try:
        content = json.loads(file.read_text())
        return [Doubt(**doubt) for doubt in content["doubts"]] if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
