"""The adversarial examples behind an evaluation: an image for each example that was broken.

witnesses.safetensors   <model>.images (m, channels, height, width) float32, <model>.indices (m,) positions in the data
                        set, <model>.labels (m,), <model>.found_by (m,) a position in the metadata's ``found_by``;
                        ``evaluated`` (n,): every example that was attacked
witnesses-<model>.pt    one tensor the size of the test set, in its order: the adversarial image, or the clean one where
                        there is none (the form that RobustBench asks for in external evaluations)
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..data.examples import stack_examples
from ..errors import ArtifactError
from ..files import save_tensors, write_bytes
from .cells import FoundImages
from .evaluate import EvaluationRun
from .image_files import WITNESSES_SCHEMA
from .outcomes import MODELS, ModelName

log = logging.getLogger(__name__)

LARGEST_TENSOR = 4 << 30
"""Bytes; a larger external form is left out."""


@dataclass(frozen=True)
class AdversarialExamples:
    """m images that one model misclassifies inside the budget; ``indices``, ``labels``, ``found_by`` (m,)."""

    images: Tensor
    indices: Tensor
    labels: Tensor
    found_by: tuple[str, ...]


def collect_adversarial(runs: Sequence[EvaluationRun]) -> dict[ModelName, AdversarialExamples]:
    """The first image that broke each broken example of the last of ``runs``, which ascend in eps, by model."""
    return {name: _collect(name, runs) for name in runs[-1].models}


def _collect(name: ModelName, runs: Sequence[EvaluationRun]) -> AdversarialExamples:
    run, examples = runs[-1], runs[-1].cells.examples
    wanted = run.models[name].correct & ~run.robust(name)
    images: dict[int, Tensor] = {}
    found_by: dict[int, str] = {}
    for by, found in _in_order(name, runs):
        new = found.at(wanted[found.rows])
        for row, image in zip(new.rows.tolist(), new.images, strict=True):
            images[row], found_by[row] = image, by
        wanted[new.rows] = False
    if wanted.any():
        raise ArtifactError(
            f"{int(wanted.sum())} broken examples of the {name} model have no image in {run.state.folder}",
            hint="evaluate them anew: --fresh",
        )
    broken = examples.at(torch.tensor(sorted(images), dtype=torch.int64))
    stacked = torch.stack([images[row] for row in sorted(images)]) if images else broken.x.cpu()
    names = tuple(found_by[row] for row in sorted(images))
    return AdversarialExamples(stacked.float(), broken.indices, broken.y.cpu(), names)


def _in_order(name: ModelName, runs: Sequence[EvaluationRun]) -> Iterator[tuple[str, FoundImages]]:
    """By whom, and what breaks the model: found on itself, attack by attack; then on the other one; then elsewhere."""
    for finder in (name, *(other for other in MODELS if other != name)):
        for attack in runs[-1].order:
            for run in runs:
                for found in run.found_on(name, (finder, attack)):
                    yield attack if finder == name else f"{attack} on {finder}", found
    for run in reversed(runs):
        yield from run.models[name].broken_by_pool


Found = Mapping[ModelName, AdversarialExamples]
"""Model -> what broke an example of it."""


def save_adversarial(path: Path, found_on: Found, run: EvaluationRun, operator: str) -> None:
    """Write ``witnesses.safetensors``; equal examples give equal bytes. ``operator``: ``Checkpoint.in_words``."""
    names = sorted({name for found in found_on.values() for name in found.found_by})
    tensors: dict[str, Tensor] = {"evaluated": run.cells.examples.indices.contiguous()}
    for model, found in found_on.items():
        tensors |= {
            f"{model}.images": found.images.contiguous(),
            f"{model}.indices": found.indices.contiguous(),
            f"{model}.labels": found.labels.long().contiguous(),
            f"{model}.found_by": torch.tensor([names.index(name) for name in found.found_by], dtype=torch.int64),
        }
    budget = run.cells.problem.budget
    about = {
        "schema": WITNESSES_SCHEMA,
        "norm": budget.norm,
        "eps": repr(budget.eps),
        "alpha": repr(run.plan.alpha),
        "operator": operator,
        "found_by": json.dumps(names),
    }
    save_tensors(path, tensors, about)
    log.info(f"witnesses: {', '.join(f'{len(f.images):,} on {n}' for n, f in found_on.items())} ({path})")


def save_external(path: Path, test: "Subset[tuple[Tensor, int]]", found: AdversarialExamples, n_evaluated: int) -> bool:
    """One tensor the size of the test set, clean images where there are no others; False where it is too large."""
    size = len(test) * test[0][0].numel() * 4
    if size > LARGEST_TENSOR:
        log.info(f"witnesses: {path.name} would take {size / 2**30:.0f} GiB and is left out")
        return False
    images, _ = stack_examples(test)
    if n_evaluated < len(test):
        log.info(
            f"witnesses: {path.name} holds the clean image of {len(test) - n_evaluated:,} examples that were not "
            "attacked; whoever judges it counts them as robust. Evaluate the whole split before you pass it on"
        )
    place = {index: i for i, index in enumerate(test.indices)}
    rows = torch.tensor([place[index] for index in found.indices.tolist()], dtype=torch.int64)
    images[rows] = found.images
    buffer = io.BytesIO()
    torch.save(images, buffer)
    write_bytes(path, buffer.getvalue())
    return True
