"""``meansparse verify FILE``: adversarial images from anywhere, judged afresh against the test set.

A file is ``witnesses.safetensors`` of an evaluation; or a bare tensor (``.pt``, ``.npy``) of the test set's size and in its
order; or images with ``indices``, positions in the test set (``.npz``, ``.safetensors``, a dict in a ``.pt``). Nothing in
it is believed: size, range and budget are checked against the true test images, and both models classify each image in
float32 and evaluation mode.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ..attacks.budget import l2_norm
from ..attacks.judge import judge
from ..attacks.problem import Problem
from ..attacks.result import Budget
from ..errors import DataError
from ..operator.active import alpha_set
from ..operator.insertion import SparsifiedModel
from ..stats.paired import Accuracy, accuracy_of
from .evaluation import ModelName

ROUNDING = {"Linf": 1e-6, "L2": 1e-5}
"""How far float32 can carry x + delta beyond eps, in pixel units of [0, 1] images."""

WITNESSES_SCHEMA = "meansparse/witnesses/1"

HINT = "expected images (n, channels, height, width) of the whole test set in its order, or images with indices"


@dataclass(frozen=True)
class ImageSet:
    """Images (m, channels, height, width) of a file; ``indices`` (m,) in the data set, or None: the whole test set.

    ``evaluated`` (n,): the examples that were attacked, where the file says; those without an image withstood.
    """

    name: str
    images: Tensor
    indices: Tensor | None = None
    evaluated: Tensor | None = None


@dataclass(frozen=True)
class MatchedImages:
    """Images whose examples are known: ``evaluated`` (n,) positions in the test split, ``rows`` (m,) into these."""

    name: str
    images: Tensor
    evaluated: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Judgement:
    """What is true of m images; ``n_unchanged`` of them are the clean ones, and show nothing. ``robust``: of the n evaluated examples, those right at the clean image and at theirs."""

    name: str
    norm: str
    n_images: int
    n_evaluated: int
    n_unchanged: int
    n_not_finite: int
    n_outside_range: int
    n_outside_budget: int
    largest_distance: float
    n_misclassified: dict[ModelName, int]
    clean: dict[ModelName, Accuracy]
    robust: dict[ModelName, Accuracy]

    @property
    def is_admissible(self) -> bool:
        """Every image is one that an attacker may use."""
        return self.n_not_finite + self.n_outside_range + self.n_outside_budget == 0

    def to_report(self) -> dict[str, Any]:
        """Plain values; accuracies are fractions."""
        row: dict[str, Any] = {
            "name": self.name, "n_images": self.n_images, "n_evaluated": self.n_evaluated, "n_unchanged": self.n_unchanged,
            "n_not_finite": self.n_not_finite, "n_outside_range": self.n_outside_range,
            "n_outside_budget": self.n_outside_budget, "largest_distance": self.largest_distance,
        }  # fmt: skip
        for model, robust in self.robust.items():
            row[model] = {
                "n_misclassified": self.n_misclassified[model], "clean_accuracy": self.clean[model].fraction,
                "robust_accuracy": robust.fraction, "robust_standard_error": robust.standard_error,
            }  # fmt: skip
        return row


def read_images(path: Path) -> list[ImageSet]:
    """Every set of images in a file. Raises ``DataError`` for a file that is not one of the known forms."""
    if not path.is_file():
        raise DataError(
            f"no file {path}", hint="evaluate --save-witnesses writes one: witnesses.safetensors in its folder"
        )
    arrays = _read_arrays(path)
    sets = []
    for model in ("base", "sparsified"):
        if f"{model}.images" in arrays:
            if f"{model}.indices" not in arrays:
                raise DataError(f"{path} holds {model}.images and no {model}.indices", hint=HINT)
            sets.append(ImageSet(model, arrays[f"{model}.images"], arrays[f"{model}.indices"], arrays.get("evaluated")))
    if not sets:
        key = next((key for key in ("images", "x", "x_adv", "adversarial", "") if key in arrays), None)
        if key is None:
            raise DataError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, but no images", hint=HINT)
        sets.append(ImageSet("images", arrays[key], arrays.get("indices")))
    for images in sets:
        _check_tensors(path, images)
    return sets


def said_by(path: Path) -> dict[str, str]:
    """``norm``, ``eps`` and ``alpha`` that a ``witnesses.safetensors`` was found under; empty for any other file."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except (OSError, SafetensorError):
        return {}  # ``read_images`` says what is wrong with it
    if about.get("schema") != WITNESSES_SCHEMA:
        return {}  # words of somebody else's, which may mean anything
    return {key: about[key] for key in ("norm", "eps", "alpha", "operator") if key in about}


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Name -> tensor; a bare tensor has the name ''. Nothing is unpickled but tensors."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix in (".npy", ".npz"):
            content = np.load(path, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {"": torch.from_numpy(content)}
            with content:
                arrays = {key: content[key] for key in content.files}
                return {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind in "fiub"}
        if path.suffix in (".pt", ".pth"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(loaded, Tensor):
                return {"": loaded}
            if isinstance(loaded, dict):
                return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
            raise DataError(f"{path} holds a {type(loaded).__name__}", hint=HINT)
    except DataError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}", hint=HINT) from error
    except Exception as error:  # torch.load and safetensors raise what they like on a broken file
        raise DataError(f"{path} cannot be read, or holds more than tensors: {error}", hint=HINT) from error
    raise DataError(f"{path}: unknown kind of file {path.suffix!r}", hint="one of .safetensors, .pt, .npz, .npy")


def _check_tensors(path: Path, given: ImageSet) -> None:
    images, indices = given.images, given.indices
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(
            f"{path}: images are {images.dtype} of shape {tuple(images.shape)}",
            hint="expected floating point in [0, 1], (n, channels, height, width)",
        )
    if indices is not None and (indices.shape != (len(images),) or indices.is_floating_point()):
        raise DataError(
            f"{path}: {len(images)} images with indices {indices.dtype} of shape {tuple(indices.shape)}", hint=HINT
        )
    evaluated = given.evaluated
    if evaluated is not None and (evaluated.ndim != 1 or evaluated.is_floating_point()):
        raise DataError(
            f"{path}: evaluated is {evaluated.dtype} of shape {tuple(evaluated.shape)}",
            hint="expected positions in the data set, (n,)",
        )
    if not len(images) and (evaluated is None or not len(evaluated)):
        raise DataError(f"{path} speaks of no example: it holds no image", hint=HINT)


def match_examples(given: ImageSet, test: "Subset[tuple[Tensor, int]]", where: str) -> MatchedImages:
    """Find each image's example in the test split. Raises ``DataError`` for a wrong count, shape or index."""
    shape = tuple(test[0][0].shape)
    if tuple(given.images.shape[1:]) != shape:
        raise DataError(
            f"{where}: images of shape {tuple(given.images.shape[1:])}, the test set has {shape}",
            hint="channels come first: (n, channels, height, width)",
        )
    if given.indices is None:
        if len(given.images) != len(test):
            raise DataError(
                f"{where}: {len(given.images):,} images, the test set has {len(test):,}",
                hint="all of them in the order of the test set, or an .npz with images and indices (positions in it)",
            )
        every = torch.arange(len(test))
        return MatchedImages(given.name, given.images.float(), every, every)
    place = {index: i for i, index in enumerate(test.indices)}
    evaluated = (given.indices if given.evaluated is None else given.evaluated).tolist()
    unknown = [index for index in {*evaluated, *given.indices.tolist()} if index not in place]
    if unknown:
        raise DataError(f"{where}: {len(unknown)} indices are not of the test set, such as {unknown[0]}")
    row = {index: i for i, index in enumerate(evaluated)}
    if len(row) < len(evaluated) or len(set(given.indices.tolist())) < len(given.indices):
        raise DataError(f"{where}: some indices are there more than once")
    if missing := [index for index in given.indices.tolist() if index not in row]:
        raise DataError(f"{where}: image of example {missing[0]}, which is not among the evaluated ones")
    positions = torch.tensor([place[index] for index in evaluated], dtype=torch.int64)
    rows = torch.tensor([row[index] for index in given.indices.tolist()], dtype=torch.int64)
    return MatchedImages(given.name, given.images.float(), positions, rows)


def judge_images(
    given: MatchedImages, x: Tensor, y: Tensor, model: nn.Module, alpha: float, budget: Budget, *, batch_size: int,
    device: str,
) -> Judgement:  # fmt: skip
    """Check ``given`` against the true images ``x`` (n, channels, height, width) and labels ``y`` (n,) of its examples.

    ``model`` is a ``SparsifiedModel``, judged at alpha = 0 and at ``alpha``, or a plain base model. An image that breaks the
    rules shows nothing: its example counts as if it had none.
    """
    images, clean = given.images, x[given.rows]
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    in_range = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1) | ~finite
    delta = torch.where(finite.view(-1, 1, 1, 1), images, clean).double() - clean.double()
    distance = delta.flatten(1).abs().amax(dim=1) if budget.norm == "Linf" else l2_norm(delta)
    near = distance <= budget.eps + ROUNDING[budget.norm]
    allowed = finite & in_range & near
    shown = x.clone()
    shown[given.rows] = torch.where(allowed.view(-1, 1, 1, 1), images, clean)

    names: tuple[tuple[ModelName, float], ...] = (("base", 0.0),)
    if isinstance(model, SparsifiedModel) and alpha:
        names = (("base", 0.0), ("sparsified", alpha))
    problem = Problem(model, budget, _n_classes(model, x[:1].to(device)), seed=0, batch_size=batch_size)
    n_misclassified, accuracy, robust = {}, {}, {}
    for name, value in names:
        with alpha_set(model, value):
            right, right_there = (~judge(problem, batch, y) for batch in (x, shown))
        n_misclassified[name] = int((~right_there[given.rows] & allowed).sum())
        accuracy[name], robust[name] = accuracy_of(right), accuracy_of(right & right_there)
    return Judgement(
        given.name, budget.norm, len(images), len(y), int((distance[finite] == 0).sum()), int((~finite).sum()), int((~in_range).sum()), int((~near).sum()),
        float(distance.max()) if len(distance) else 0.0, n_misclassified, accuracy, robust,
    )  # fmt: skip


def _n_classes(model: nn.Module, images: Tensor) -> int:
    with torch.no_grad():
        return int(model(images).shape[1])
