"""The adversarial images behind an evaluation: one for each example that an attack broke, judged once more.

witnesses.safetensors      <model>.images (m, channels, height, width) float32, <model>.indices (m,) positions in the
                           data set, <model>.labels (m,), <model>.found_by (m,) a position in the metadata's
                           ``found_by``; ``evaluated`` (n,): every example that was attacked
witnesses-<model>.pt       one tensor the size of the test set, in its order: the witness, or the clean image where
                           there is none (the form that RobustBench asks for in external evaluations)
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..attacks.budget import within_budget
from ..attacks.judge import judge
from ..attacks.problem import Problem
from ..attacks.result import Budget
from ..data.examples import stack_examples
from ..errors import ArtifactError
from ..files import save_tensors, write_bytes
from ..operator.active import alpha_set
from ..operator.device import device_of
from ..operator.insertion import SparsifiedModel
from .evaluate import EvaluateSettings
from .evaluation import MODELS, TRANSFER, WORST_CASE, Evaluation, ModelName, attack_groups
from .pool import admissible
from .state import Chunk, read_chunks
from .verify import WITNESSES_SCHEMA

log = logging.getLogger(__name__)

LARGEST_TENSOR = 4 << 30
"""Bytes; a larger external form is left out."""


@dataclass(frozen=True)
class Witnesses:
    """m images that one model misclassifies inside the budget; ``indices``, ``labels`` (m,); ``found_by`` (m,) names."""

    images: Tensor
    indices: Tensor
    labels: Tensor
    found_by: tuple[str, ...]


def collect_witnesses(
    model: SparsifiedModel,
    x: Tensor,
    y: Tensor,
    evaluation: Evaluation,
    folders: list[Path],
    settings: EvaluateSettings,
    pool: Mapping[str, Chunk],
) -> dict[ModelName, Witnesses]:
    """Every broken example's first image that holds, from the state folders of an evaluation, by model.

    ``x`` (n, channels, height, width), ``y`` (n,): the evaluated examples. ``folders``: that of the evaluation, and those
    of smaller eps, whose breaks it took over. An image found on the other model, or of the ``pool`` that was tried too,
    counts where this one fails on it.
    Raises ``ArtifactError`` where a break has no image.
    """
    names = MODELS if evaluation.alpha else MODELS[:1]
    budget = Budget(settings.norm, settings.eps)
    allowed = {source: admissible(chunk, x, budget) for source, chunk in pool.items()}
    return {name: _collect(name, model, x, y, evaluation, folders, settings, allowed) for name in names}


def _collect(
    name: ModelName, model: SparsifiedModel, x: Tensor, y: Tensor, evaluation: Evaluation, folders: list[Path],
    settings: EvaluateSettings, pool: Mapping[str, Chunk],
) -> Witnesses:  # fmt: skip
    outcomes = evaluation.outcomes(name)
    robust = outcomes.robust_to(attack_groups(evaluation.attacks)[WORST_CASE])
    wanted = torch.from_numpy(outcomes.correct & ~robust)  # type: ignore[operator]
    device = device_of(model, x.device)
    budget = Budget(settings.norm, settings.eps)
    problem = Problem(model, budget, _n_classes(model, x[:1].to(device)), settings.seed, settings.batch_size)
    images: dict[int, Tensor] = {}
    found_by: dict[int, str] = {}
    # row -> the first image inside the budget, of a source that the evaluation saw break it
    inside_only: dict[int, tuple[Tensor, str]] = {}
    with alpha_set(model, evaluation.alpha if name == "sparsified" else 0.0):
        for by, chunk in _chunks(name, evaluation, folders, pool):
            positions = chunk.positions[chunk.broken]
            inside = positions < len(y)
            useful = inside.clone()
            useful[inside] = wanted[positions[inside]]
            if chunk.adversarial is None or not useful.any():
                continue
            rows, candidates = positions[useful], chunk.adversarial[useful]
            holds = within_budget(candidates, x[rows].cpu(), budget)
            seen = outcomes.broken[by if by in evaluation.attacks else TRANSFER]
            for row, image in zip(rows[holds].tolist(), candidates[holds], strict=True):
                if seen[row]:
                    inside_only.setdefault(row, (image, by))
            candidates = torch.where(holds.view(-1, 1, 1, 1), candidates, x[rows].cpu())
            labels = y[rows.to(y.device)].to(device)
            holds &= judge(problem, candidates.to(device), labels).cpu()
            for row, image in zip(rows[holds].tolist(), candidates[holds], strict=True):
                images[row], found_by[row] = image, by
            wanted[rows[holds]] = False
    # The evaluation saw these fall, in a batch of other images: another order of a sum can undo a break by a hair.
    by_a_hair = [row for row in wanted.nonzero().flatten().tolist() if row in inside_only]
    for row in by_a_hair:
        images[row], found_by[row] = inside_only[row]
        wanted[row] = False
    if by_a_hair:
        log.info(f"witnesses: {len(by_a_hair)} on {name} are so near the boundary that a second judgement differs")
    if wanted.any():
        raise ArtifactError(
            f"{int(wanted.sum())} broken examples of the {name} model have no image in {folders[0]}",
            hint="evaluate them anew: --fresh",
        )
    rows = torch.tensor(sorted(images), dtype=torch.int64)
    stacked = torch.stack([images[row] for row in rows.tolist()]) if images else x[:0].cpu()
    indices = torch.from_numpy(evaluation.indices)[rows]
    return Witnesses(stacked.float(), indices, y.cpu()[rows], tuple(found_by[row] for row in rows.tolist()))


def _chunks(
    name: ModelName, evaluation: Evaluation, folders: list[Path], pool: Mapping[str, Chunk]
) -> Iterator[tuple[str, Chunk]]:
    """What was found on the model itself, in the order of the attacks; then on the other one; then elsewhere. By whom."""
    for source in (name, *(other for other in MODELS if other != name)):
        for attack in evaluation.attacks:
            for folder in folders:
                for _, chunk in read_chunks(folder, source, attack):
                    yield attack if source == name else f"{attack} on {source}", chunk
    yield from pool.items()


def save_witnesses(
    path: Path,
    witnesses: Mapping[ModelName, Witnesses],
    evaluated: Tensor,
    *,
    norm: str,
    eps: float,
    alpha: float,
    operator: str,
) -> None:
    """Write ``witnesses.safetensors``; equal witnesses give equal bytes. ``operator``: ``Checkpoint.in_words``."""
    names = sorted({name for found in witnesses.values() for name in found.found_by})
    tensors: dict[str, Tensor] = {"evaluated": evaluated.cpu().long().contiguous()}
    for model, found in witnesses.items():
        tensors |= {
            f"{model}.images": found.images.contiguous(),
            f"{model}.indices": found.indices.contiguous(),
            f"{model}.labels": found.labels.long().contiguous(),
            f"{model}.found_by": torch.tensor([names.index(name) for name in found.found_by], dtype=torch.int64),
        }
    about = {
        "schema": WITNESSES_SCHEMA, "norm": norm, "eps": repr(eps), "alpha": repr(alpha), "operator": operator,
        "found_by": json.dumps(names),
    }  # fmt: skip
    save_tensors(path, tensors, about)


def save_external(path: Path, test: "Subset[tuple[Tensor, int]]", witnesses: Witnesses, n_evaluated: int) -> bool:
    """One tensor the size of the test set, the clean image where there is no witness. False where it would be too large.

    ``n_evaluated`` examples of it were attacked.
    """
    size = len(test) * test[0][0].numel() * 4
    if size > LARGEST_TENSOR:
        log.info(f"witnesses: {path.name} would take {size / 2**30:.0f} GiB and is left out")
        return False
    images, _ = stack_examples(test)
    if n_evaluated < len(test):
        log.info(
            f"witnesses: {path.name} holds the clean image of {len(test) - n_evaluated:,} examples that were not attacked; whoever "
            "judges it counts them as robust. Evaluate the whole split before you pass it on"
        )
    place = {index: i for i, index in enumerate(test.indices)}
    rows = torch.tensor([place[index] for index in witnesses.indices.tolist()], dtype=torch.int64)
    images[rows] = witnesses.images
    buffer = io.BytesIO()
    torch.save(images, buffer)
    write_bytes(path, buffer.getvalue())
    return True


def examples_at(test: "Subset[tuple[Tensor, int]]", positions: Tensor) -> tuple[Tensor, Tensor]:
    """Images (m, channels, height, width) and labels (m,) at ``positions`` (m,) of the test split."""
    return stack_examples(Subset(test, positions.tolist()))


def _n_classes(model: SparsifiedModel, images: Tensor) -> int:
    with torch.no_grad():
        return int(model(images).shape[1])
