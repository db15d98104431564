"""The rule that judges a claim, on outcomes with known sums."""

import numpy as np
import pytest

from meansparse_cli.paper.claims import Judgement, judge
from meansparse_cli.paper.subset import relative_errors
from meansparse_cli.paper.tables import Claim
from meansparse_cli.reporting.template import _environment

A, B = ("column", "a"), ("column", "b")


def outcomes(n_right: dict[tuple[str, str], int], n: int = 1000):  # type: ignore[no-untyped-def]
    return lambda place: (np.arange(n), np.arange(n) < n_right[place]) if place in n_right else None


def sentence(found: Judgement) -> str:
    return str(_environment("meansparse_cli.paper", False).get_template("parts.md").module.claim("APGD", found, None))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [(520, 500, "confirmed"), (500, 520, "contradicted"), (505, 500, "inconclusive"), (503, 500, "inconclusive")],
)
def test_a_difference(a: int, b: int, answer: str) -> None:
    found = judge(Claim("more", {A: 1, B: -1}), 0.01, outcomes({A: a, B: b}))
    assert found.answer == answer and found.ours == pytest.approx((a - b) / 1000)
    p = abs(a - b) / 1000
    assert found.standard_error == pytest.approx((p * (1 - p) / 1000) ** 0.5), "paired: nested outcomes"


def test_differences_that_cancel_are_inconclusive() -> None:
    right = {A: np.array([True, False] * 50), B: np.array([False, True] * 50)}
    found = judge(Claim("more", {A: 1, B: -1}), 0.01, lambda place: (np.arange(100), right[place]))
    assert found.answer == "inconclusive" and found.ours == 0 and found.standard_error == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("right", "n", "answer"),
    [(0, 1000, "confirmed"), (0, 300, "inconclusive"), (18, 1000, "contradicted"), (14, 1000, "inconclusive")],
)
def test_next_to_nothing_is_left(right: int, n: int, answer: str) -> None:
    claim = Claim("next to nothing", {A: 1}, bound=0.01, is_below=True)
    found = judge(claim, 0.0001, outcomes({A: right}, n))
    assert found.answer == answer
    assert " %" in sentence(found) and "points" not in sentence(found)


@pytest.mark.parametrize(("a", "answer"), [(500, "confirmed"), (480, "contradicted"), (494, "inconclusive")])
def test_no_worse_than_by_a_margin(a: int, answer: str) -> None:
    assert judge(Claim("as good", {A: 1, B: -1}, bound=-0.005), 0.0, outcomes({A: a, B: 500})).answer == answer


def test_an_open_question_says_how_many_images_the_papers_number_takes() -> None:
    found = judge(Claim("more", {A: 1, B: -1}), 0.01, outcomes({A: 508, B: 500, ("column", "c"): 0}))
    assert found.answer == "confirmed" and found.n_for_the_papers is None  # 0.28 points: 1,000 are enough for 1 point
    right = {A: np.arange(1000) % 10 == 0, B: np.arange(1000) % 10 == 1}  # 100 either way: an error of 1.41 points
    open_ = judge(Claim("more", {A: 1, B: -1}), 0.01, lambda place: (np.arange(1000), right[place]))
    assert open_.n_for_the_papers == 16_000  # 1000 * (2.8 * 1.41)^2 = 15,700
    assert "on 1,000 images (the paper's number would take about 16,000)." in sentence(open_)
    far = judge(Claim("more", {A: 1, B: -1}), 0.05, lambda place: (np.arange(1000), right[place]))
    assert "on 1,000 images (the paper's number lies outside our 95 % interval)." in sentence(far)


def test_other_images_and_missing_cells_are_no_answer() -> None:
    claim = Claim("more", {A: 1, B: -1})
    assert judge(claim, 0.0, outcomes({A: 600})).answer == "not run"
    places = {A: np.arange(10), B: np.arange(10) + 1}
    found = judge(claim, 0.0, lambda place: (places[place], np.arange(10) < 5))
    assert found.answer == "inconclusive" and "same images" in found.why


def test_relative_errors() -> None:
    part, whole = [np.array([1.1, 3.0]), np.array([0.0])], [np.array([1.0, 4.0]), np.array([0.0])]
    mean_of_ratios, ratio_of_sums = relative_errors(part, whole)
    assert mean_of_ratios == pytest.approx((0.1 + 0.25) / 2) and ratio_of_sums == pytest.approx(1.1 / 5)
