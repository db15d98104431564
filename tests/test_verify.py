"""Images from anywhere, judged afresh: known answers on a linear model, every kind of file, every kind of mistake."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Subset

from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.data.examples import Examples
from meansparse_cli.data.read import ArrayImages
from meansparse_cli.engine.image_files import WITNESSES_SCHEMA, MatchedImages, match_examples, read_images, said_by
from meansparse_cli.engine.verify import JudgedSets, Judgement, judge_images, judgement_of
from meansparse_cli.errors import DataError
from meansparse_cli.ledger import Ledger
from meansparse_cli.operator.insertion import insert
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.sites.find import find_sites

EPS = 0.1


class Brightness(nn.Module):
    """Class 1 above a mean of 0.5; a band of 0.05 around it, at alpha = 1, is class 0 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        value = self.act(x.mean((2, 3)) + 10).mean(1, keepdim=True) - 10
        return torch.cat([0.5 - value, value - 0.5], dim=1)


def a_test_set(n: int = 10) -> "Subset[tuple[Tensor, int]]":
    """Grey images from 0.2 to 0.8; every index is one more than its position."""
    values = np.linspace(51, 204, n + 1).round().astype(np.uint8)
    x = np.broadcast_to(values[:, None, None, None], (n + 1, 4, 4, 3)).copy()
    y = (values > 127).astype(np.int64)
    return Subset(ArrayImages(x, y, source="grey"), list(range(1, n + 1)))


def stacked(test: "Subset[tuple[Tensor, int]]") -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in test]), torch.tensor([y for _, y in test])  # type: ignore[attr-defined]


def whole(given: MatchedImages, examples: Examples, problem: Problem, alpha: float) -> Judgement:
    rows = torch.arange(len(given.evaluated))
    return judgement_of(given.name, judge_images(given, rows, examples, problem, alpha))


def judged(path: Path, eps: float = EPS, norm: Any = "Linf") -> Judgement:
    test = a_test_set()
    given = match_examples(read_images(path)[0], test, str(path))
    x, y = stacked(Subset(test, given.evaluated.tolist()))
    problem = Problem(Brightness().eval(), Budget(norm, eps), n_classes=2, seed=0, batch_size=4)
    return whole(given, Examples(x, y, given.evaluated), problem, 0.0)


def saved(path: Path, images: Tensor, indices: Tensor | None = None) -> Path:
    arrays = {"images": images} | ({} if indices is None else {"indices": indices})
    if path.suffix == ".safetensors":
        save_file(arrays, path)
    elif path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in arrays.items()})  # type: ignore[arg-type]
    elif path.suffix == ".npy":
        np.save(path, images.numpy())
    else:
        torch.save(images if indices is None else arrays, path)
    return path


def attacked() -> tuple[Tensor, Tensor, Tensor]:
    """Every image moved by eps towards the boundary; labels; which of them cross it."""
    x, y = stacked(a_test_set())
    away = torch.where(y == 1, -1.0, 1.0).view(-1, 1, 1, 1)
    moved = (x.double() + away * EPS).clamp(0, 1).float()
    return moved, y, (moved.mean((1, 2, 3)) > 0.5).long() != y


@pytest.mark.parametrize("name", ["a.pt", "a.npy", "a.npz", "a.safetensors"])
def test_a_bare_tensor_of_the_whole_test_set(name: str, tmp_path: Path) -> None:
    moved, _, crosses = attacked()
    assert 0 < int(crosses.sum()) < len(moved)
    found = judged(saved(tmp_path / name, moved))
    assert found.is_admissible
    assert (found.n_images, found.n_evaluated, found.n_unchanged) == (10, 10, 0)
    assert found.largest_distance == pytest.approx(EPS, abs=1e-6)
    assert found.n_misclassified == {"base": int(crosses.sum())}
    assert found.robust["base"].fraction == 1 - crosses.double().mean().item()
    assert found.clean["base"].fraction == 1.0


@pytest.mark.parametrize("name", ["a.pt", "a.npz", "a.safetensors"])
def test_some_images_with_indices_in_any_order(name: str, tmp_path: Path) -> None:
    moved, _, crosses = attacked()
    some = torch.tensor([7, 0, 5])
    found = judged(saved(tmp_path / name, moved[some], some + 1))  # an index is one more than its position
    assert found.is_admissible
    assert (found.n_images, found.n_evaluated) == (3, 3)
    assert found.n_misclassified == {"base": int(crosses[some].sum())}


def test_what_breaks_the_rules_is_counted_and_shows_nothing(tmp_path: Path) -> None:
    moved, y, crosses = attacked()
    x, _ = stacked(a_test_set())
    bad = moved.clone()
    bad[0] = torch.nan
    bad[1] = -0.01
    bad[9] = 1.0 - x[9]  # far outside the budget, and misclassified
    bad[8, 0, 0, 0] -= 0.001  # one pixel, just outside
    found = judged(saved(tmp_path / "a.pt", bad))
    assert not found.is_admissible
    assert (found.n_not_finite, found.n_outside_range, found.n_outside_budget) == (1, 1, 3)
    kept = crosses.clone()
    kept[[0, 1, 8, 9]] = False
    assert found.n_misclassified == {"base": int(kept.sum())}
    assert found.robust["base"].fraction == 1 - kept.double().mean().item()


def test_the_l2_budget_is_of_the_whole_image(tmp_path: Path) -> None:
    moved, _, _ = attacked()
    path = saved(tmp_path / "a.pt", moved)
    length = EPS * (3 * 4 * 4) ** 0.5
    assert judged(path, eps=length + 1e-4, norm="L2").is_admissible
    assert judged(path, eps=length - 1e-3, norm="L2").n_outside_budget == 10


def test_both_models_are_judged_on_the_same_images() -> None:
    test = a_test_set()
    x, y = stacked(test)
    model = Brightness().eval()
    sites = find_sites(model, x[:2])
    operators = [MeanSparse(torch.full((3,), 10.45), torch.full((3,), 0.1)) for _ in sites]  # 10.35 to 10.55
    given = match_examples(_whole(x), test, "clean")
    problem = Problem(insert(model, sites, operators), Budget("Linf", EPS), n_classes=2, seed=0, batch_size=4)
    found = whole(given, Examples(x, y, given.evaluated), problem, 1.0)
    value = x.mean((1, 2, 3))
    lost = (value > 0.5) & (value <= 0.55)
    assert int(lost.sum()) > 0
    assert found.n_misclassified == {"base": 0, "sparsified": int(lost.sum())}
    assert found.largest_distance == 0.0
    assert found.n_unchanged == len(x)


def _whole(x: Tensor) -> Any:
    from meansparse_cli.engine.image_files import ImageSet

    return ImageSet("images", x)


def test_examples_that_several_judge_are_counted_once(tmp_path: Path) -> None:
    test = a_test_set()
    x, y = stacked(test)
    moved, _, _ = attacked()
    given = [match_examples(_whole(images), test, "two") for images in (moved, x)]
    problem = Problem(Brightness().eval(), Budget("Linf", EPS), n_classes=2, seed=0, batch_size=4)
    alone = [whole(one, Examples(x, y, one.evaluated), problem, 0.0) for one in given]

    for writer, numbers in (("a", range(0, 20, 2)), ("b", range(3, 20))):
        judged = JudgedSets(Ledger(tmp_path, {}, writer=writer), given)
        for k, one in enumerate(given):
            for rows in judged.in_set(k, numbers, 3):
                judged.add(k, rows, judge_images(one, rows, Examples(x, y, one.evaluated).at(rows), problem, 0.0))
        assert judged.missing(range(5)) == ([1, 3] if writer == "a" else [1])
    last = JudgedSets(Ledger(tmp_path, {}), given)
    assert last.missing() == [1]
    one = torch.tensor([1])
    last.add(0, one, judge_images(given[0], one, Examples(x, y, given[0].evaluated).at(one), problem, 0.0))
    assert last.missing() == []
    assert last.judgements() == alone


def test_words_in_a_foreign_file_are_not_taken_for_ours(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file({"images": torch.zeros(1, 3, 4, 4)}, theirs, {"eps": "8/255", "alpha": "none", "norm": "inf"})
    save_file({"images": torch.zeros(1, 3, 4, 4)}, ours, {"schema": WITNESSES_SCHEMA, "eps": "0.03", "alpha": "0.25"})
    assert said_by(theirs) == {}
    assert said_by(ours) == {"eps": "0.03", "alpha": "0.25"}


def test_mistakes(tmp_path: Path) -> None:
    moved, _, _ = attacked()
    (tmp_path / "broken.pt").write_bytes(b"not a tensor")
    (tmp_path / "a.txt").write_text("")
    torch.save({"weights": nn.Linear(1, 1)}, tmp_path / "pickle.pt")
    np.savez(tmp_path / "words.npz", name=np.array(["a"]), index=np.arange(3))
    save_file({"base.images": moved}, tmp_path / "half.safetensors")
    square = {
        "base.images": moved[:1],
        "base.indices": torch.tensor([1]),
        "evaluated": torch.ones(2, 2, dtype=torch.int64),
    }
    save_file(square, tmp_path / "square.safetensors")
    cases = [
        (tmp_path / "words.npz", "holds index, but no images"),
        (tmp_path / "none.pt", "no file"),
        (tmp_path / "a.txt", "unknown kind of file"),
        (tmp_path / "broken.pt", "cannot be read"),
        (tmp_path / "pickle.pt", "more than tensors"),
        (saved(tmp_path / "short.pt", moved[:9]), "9 images, the test set has 10"),
        (saved(tmp_path / "shape.pt", moved.permute(0, 2, 3, 1)), "channels come first"),
        (saved(tmp_path / "bytes.pt", (moved * 255).to(torch.uint8)), "expected floating point"),
        (saved(tmp_path / "flat.pt", moved.flatten(1)), r"shape \(10, 48\)"),
        (saved(tmp_path / "unknown.pt", moved[:2], torch.tensor([0, 1])), "not of the test set, such as 0"),
        (saved(tmp_path / "twice.pt", moved[:2], torch.tensor([1, 1])), "more than once"),
        (saved(tmp_path / "fewer.pt", moved[:2], torch.tensor([1])), "2 images with indices"),
        (saved(tmp_path / "empty.npz", moved[:0], torch.tensor([], dtype=torch.int64)), "speaks of no example"),
        (tmp_path / "half.safetensors", "base.images and no base.indices"),
        (tmp_path / "square.safetensors", r"evaluated is torch.int64 of shape \(2, 2\)"),
    ]
    for path, expected in cases:
        with pytest.raises(DataError, match=expected):
            judged(path)
