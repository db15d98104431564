"""Adversarial images from anywhere: read, and matched with the examples that they are of.

A file is ``witnesses.safetensors`` of an evaluation; or a bare tensor (``.pt``, ``.npy``) of the test set's size and in
its order; or images with ``indices``, positions in the test set (``.npz``, ``.safetensors``, a dict in a ``.pt``).
Nothing in it is believed: ``evaluate --pool`` tries on both models what keeps the rules (``Cells.admitted``),
``verify`` judges it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..errors import DataError
from ..foreign import reading
from .cells import FoundImages

WITNESSES_SCHEMA = "meansparse/witnesses/1"

WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)
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
    is_whole: bool = False
    """Of the whole test set, in its order: the file says nothing of which were attacked."""

    @cached_property
    def image_of(self) -> Tensor:
        """(n,): the place in ``images`` of each evaluated example's image; -1 where it has none."""
        places = torch.full((len(self.evaluated),), -1)
        places[self.rows] = torch.arange(len(self.rows))
        return places


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
            raise DataError(f"{path} holds {', '.join(sorted(arrays)[:8]) or 'nothing'}, but no images", hint=HINT)
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
    said = {key: about[key] for key in ("norm", "eps", "alpha", "operator") if key in about}
    means = {"norm": said.get("norm") in ("Linf", "L2")}
    means |= {key: _within(said.get(key), least, 1e9) for key, least in (("eps", 1e-9), ("alpha", 0))}
    for key, is_so in means.items():
        if key in said and not is_so:
            raise DataError(
                f"{path}: its metadata says {key} {said[key][:40]!r}, which means nothing",
                hint="an .npz of the same images and indices says nothing of that, and is judged as asked",
            )
    return said


def _within(text: str | None, least: float, most: float) -> bool:
    try:
        return least <= float(text or "") <= most
    except ValueError:
        return False


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Name -> tensor; a bare tensor has the name ''. Nothing is unpickled but tensors."""
    # torch.load and safetensors raise what they like on a broken file
    with reading(DataError, f"{path} cannot be read, or holds more than tensors", HINT):
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
            return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    raise DataError(f"{path}: unknown kind of file {path.suffix!r}", hint="one of .safetensors, .pt, .npz, .npy")


def _check_tensors(path: Path, given: ImageSet) -> None:
    images, indices, evaluated = given.images, given.indices, given.evaluated

    def expect(is_so: bool, found: str, hint: str = HINT) -> None:
        if not is_so:
            raise DataError(f"{path}: {found}", hint=hint)

    def in_words(tensor: Tensor | None) -> str:
        return "" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"

    tensors = [tensor for tensor in (images, indices, evaluated) if tensor is not None]
    are_plain = all(t.layout == torch.strided and t.device.type == "cpu" for t in tensors)
    expect(are_plain, "a tensor is sparse or without values", "expected plain tensors on the CPU")
    are_images = images.ndim == 4 and images.is_floating_point()
    expect(
        are_images, f"images are {in_words(images)}", "expected floating point in [0, 1], (n, channels, height, width)"
    )
    are_indices = indices is None or (indices.shape == (len(images),) and indices.dtype in WHOLE)
    expect(are_indices, f"{len(images)} images with indices {in_words(indices)}")
    are_positions = evaluated is None or (evaluated.ndim == 1 and evaluated.dtype in WHOLE)
    expect(are_positions, f"evaluated is {in_words(evaluated)}", "expected positions in the data set, (n,)")
    n_examples = len(images) if evaluated is None else len(images) + len(evaluated)
    expect(n_examples > 0, "it holds no image, and speaks of no example")


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
        return MatchedImages(given.name, given.images.float(), every, every, is_whole=True)
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


def read_pool(files: Sequence[Path], split: "Subset[tuple[Tensor, int]]", indices: Tensor) -> dict[str, FoundImages]:
    """Source -> the images of ``files`` that are of the examples at ``indices`` (n,), of the whole ``split``."""
    row_of = {index: row for row, index in enumerate(indices.tolist())}
    pool = {}
    for file in files:
        for given in read_images(file):
            matched = match_examples(given, split, str(file))
            examples = [split.indices[i] for i in matched.evaluated[matched.rows].tolist()]
            rows = torch.tensor([row_of.get(example, -1) for example in examples], dtype=torch.int64)
            name = str(file) if given.name == "images" else f"{file}, {given.name}"
            pool[name] = FoundImages(rows, matched.images).at(rows >= 0)
    return pool
