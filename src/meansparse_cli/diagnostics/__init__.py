"""Reasons not to believe an evaluation, each checked and put beside the number behind it.

What a sceptical reader asks for after "Evaluating adversarial robustness" (Carlini et al. 2019), what AutoAttack flags, and
the indicators of attack failure of Pintor et al. (2022), besides what follows from the operator itself: what it masks,
and where its gradient points. The limits stand beside the checks. A doubt that warns says which number not to build on; an image
that breaks an example on the way, of noise or of another start, is handed back, so that it can count.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..attacks.judge import under_attack
from ..attacks.result import Budget
from ..engine.evaluation import MODELS, WORST_CASE, Evaluation, attack_groups, is_bpda
from ..engine.state import Chunk
from ..errors import ArtifactError
from ..files import load_torch, save_torch, write_bytes
from ..operator.active import alpha_set
from ..operator.insertion import SparsifiedModel
from .doubt import Doubt, Subject
from .gradients import doubt_gradients
from .outcomes import doubt_outcomes
from .outputs import doubt_outputs
from .search import doubt_search

__all__ = ["DOUBTS_VERSION", "Doubt", "Doubted", "find_doubts"]

DOUBTS_VERSION = 2
"""Raised when a check finds other numbers than before."""


Broken = list[tuple[Tensor, Tensor]]
"""Pairs of positions (m,) and images (m, channels, height, width)."""


@dataclass(frozen=True)
class Doubted:
    """``doubts`` in the order of the report; ``images``: what the checks broke, "doubts of <model>" -> a pool to be tried."""

    doubts: list[Doubt]
    images: dict[str, Chunk]


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
) -> Doubted:
    """Every doubt about both models (about the base alone at alpha = 0), in the order of the report.

    ``x`` (n, channels, height, width) float32 in [0, 1], ``y`` and ``indices`` (n,): the first n examples of
    ``evaluation``, on the model's device. ``on_kind`` is called as each kind of check begins, with what it is of, how many
    are done and how many there are. Each kind is kept in ``state_folder`` as it ends and read back under the same ``key``.
    Nothing is left changed on the model. Costs about 2,000 forward passes an example that survives, a backward pass
    counted as two.
    """
    worst = attack_groups(evaluation.attacks)[WORST_CASE]
    bpda, doubts, images = any(is_bpda(attack) for attack in evaluation.attacks), list[Doubt](), dict[str, Chunk]()
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
                kept = None if file is None else _kept(file, key)
                if kept is None:
                    n_before = len(subject.broken_by)
                    found = find(subject)
                    if file is not None:
                        _keep(file, key, found, subject.broken_by[n_before:])
                else:
                    found, broken_by = kept
                    subject.broken_by.extend(broken_by)
                doubts += found
        if (chunk := _as_pool(subject.broken_by)) is not None:
            images[f"doubts of {name}"] = chunk
    return Doubted(doubts, images)


def _as_pool(broken_by: Sequence[tuple[Tensor, Tensor]]) -> Chunk | None:
    """The first image of each position, in order; None where nothing was broken."""
    first: dict[int, Tensor] = {}
    for rows, images in broken_by:
        for row, image in zip(rows.tolist(), images, strict=True):
            first.setdefault(row, image)
    if not first:
        return None
    positions = torch.tensor(sorted(first))
    every = torch.ones_like(positions, dtype=torch.bool)
    none = torch.zeros_like(positions)
    return Chunk(positions, every, none.view(-1, 1).repeat(1, 2), none, torch.stack([first[p] for p in sorted(first)]))


def _keep(file: Path, key: str, found: list[Doubt], broken_by: Broken) -> None:
    """Put a kind on disk: its images first, since the answers say that they are there."""
    n = sum(len(rows) for rows, _ in broken_by)
    if n:
        pairs = [{"rows": rows, "images": images} for rows, images in broken_by]
        save_torch(file.with_suffix(".pt"), {"key": key, "broken_by": pairs})
    content = {"key": key, "doubts": [asdict(doubt) for doubt in found], "n_images": n}
    write_bytes(file, json.dumps(content).encode())


def _kept(file: Path, key: str) -> tuple[list[Doubt], Broken] | None:
    """What an earlier session found; None where that is not there, or of something else."""
    try:
        content = json.loads(file.read_text())
        if content["key"] != key:
            return None
        broken_by: Broken = []
        if content["n_images"]:
            state = load_torch(file.with_suffix(".pt"))
            if state["key"] != key:
                return None
            broken_by = [(pair["rows"], pair["images"]) for pair in state["broken_by"]]
        return [Doubt(**doubt) for doubt in content["doubts"]], broken_by
    except (OSError, ValueError, KeyError, TypeError, ArtifactError):
        return None
