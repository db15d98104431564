"""Accuracies, paired differences and the verdict, against numpy and by hand."""

import math

import numpy as np
import pytest
import torch

from meansparse_cli.errors import DataError
from meansparse_cli.stats.paired import PairedDifference, accuracy_of, paired_difference
from meansparse_cli.stats.verdict import MARGIN, examples_to_tell, is_inside, verdict


def outcomes(n_right: int, n: int = 1000) -> np.ndarray:
    return np.arange(n) < n_right


def test_an_accuracy_is_a_fraction_with_its_binomial_error() -> None:
    accuracy = accuracy_of(outcomes(250))
    assert (accuracy.fraction, accuracy.n) == (0.25, 1000)
    assert accuracy.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 1000))
    assert accuracy_of(torch.tensor([True, True])) == accuracy_of(np.array([True, True]))


def test_all_or_none_right_has_half_of_wilsons_interval() -> None:
    for outcomes in (np.ones(7, bool), np.zeros(7, bool)):
        # Wilson at z = 1: (p + 1 / 2n ± sqrt(p (1 - p) / n + 1 / 4n^2)) / (1 + 1 / n)
        assert accuracy_of(outcomes).standard_error == pytest.approx((1 / 14) / (1 + 1 / 7))


@pytest.mark.parametrize("bad", [np.zeros(0, dtype=bool), np.array([0.5]), np.ones((2, 2), dtype=bool)])
def test_what_is_not_a_vector_of_outcomes_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected bool"):
        accuracy_of(bad)


def test_two_lengths_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="of 3 and of 2 examples"):
        paired_difference(outcomes(1, 3), outcomes(1, 2))


def test_paired_standard_error_is_numpys_over_the_differences() -> None:
    rng = np.random.default_rng(0)
    mine, theirs = rng.random(503) < 0.6, rng.random(503) < 0.5
    paired = paired_difference(torch.from_numpy(mine), theirs)
    differences = mine.astype(float) - theirs.astype(float)
    assert paired.difference == pytest.approx(differences.mean())
    assert paired.standard_error == pytest.approx(differences.std() / math.sqrt(503))
    assert paired.gained == (mine & ~theirs).sum()
    assert paired.lost == (theirs & ~mine).sum()
    # McNemar's form of the same number
    discordant = (paired.gained + paired.lost) / 503
    assert paired.standard_error == pytest.approx(math.sqrt((discordant - paired.difference**2) / 503))
    low, high = paired.interval_95
    assert (low + high) / 2 == pytest.approx(paired.difference * 503 / 505)
    assert high - low == pytest.approx(2 * 1.96 * paired.standard_error, rel=0.01)


def test_the_interval_covers_even_where_few_examples_change_sides() -> None:
    """Over every outcome of n examples, weighted with its probability; the plain normal interval is the control."""
    for n, win, lose in ((20, 0.05, 0.05), (50, 0.02, 0.0), (100, 0.01, 0.03), (100, 0.1, 0.05)):
        truth, covered, by_normal = win - lose, 0.0, 0.0
        for gained in range(n + 1):
            for lost in range(n + 1 - gained):
                same = n - gained - lost
                ways = math.comb(n, gained) * math.comb(n - gained, lost)
                weight = ways * win**gained * lose**lost * (1 - win - lose) ** same
                difference = (gained - lost) / n
                error = math.sqrt(((gained + lost) / n - difference**2) / n)
                low, high = PairedDifference(difference, error, gained, lost, n).interval_95
                covered += weight * (low <= truth <= high)
                by_normal += weight * (abs(difference - truth) <= 1.96 * error)
        assert covered > 0.94, (n, win, lose, covered)
        assert by_normal < covered


def test_two_examples_without_a_flip_show_next_to_nothing() -> None:
    low, high = paired_difference(outcomes(2, 2), outcomes(2, 2)).interval_95
    assert (low, high) == (pytest.approx(-0.49, abs=0.001), pytest.approx(0.49, abs=0.001))
    same = outcomes(2, 2)
    found = verdict(base_plain=same, sparsified_plain=same, base_worst=same, sparsified_worst=same)
    assert found.name == "inconclusive" and "95 % interval, -49.00 to +49.00" in found.reason
    assert paired_difference(outcomes(1, 1), outcomes(0, 1)).interval_95[1] <= 1


def test_pairing_is_what_makes_a_small_difference_visible() -> None:
    paired = paired_difference(outcomes(510), outcomes(500))
    assert paired.standard_error < 0.25 * accuracy_of(outcomes(500)).standard_error
    assert paired.is_clear


@pytest.mark.parametrize(
    ("won", "lost", "clear"), [(12, 4, False), (13, 4, True), (6, 0, True), (5, 0, False), (0, 6, True)]
)
def test_what_is_clear_and_the_interval_say_the_same(won: int, lost: int, clear: bool) -> None:
    theirs = np.arange(1000) < 500
    mine = theirs.copy()
    mine[500 : 500 + won], mine[:lost] = True, False
    paired = paired_difference(mine, theirs)
    low, high = paired.interval_95
    assert (paired.gained, paired.lost) == (won, lost)
    assert paired.is_clear == clear
    assert not (paired.is_clear and low <= 0 <= high)


def test_five_flips_are_never_clear() -> None:
    assert not paired_difference(outcomes(505), outcomes(500)).is_clear
    assert paired_difference(outcomes(506), outcomes(500)).is_clear
    assert not paired_difference(outcomes(1, 1), outcomes(0, 1)).is_clear


@pytest.mark.parametrize(
    ("plain", "worst", "name", "words"),
    [
        # gains in examples of 1000, base at 500 under the plain attacks and at 490 in the worst case
        (30, 30, "real gain", "BPDA included"),
        (60, 20, "real gain", "part of the gain under the plain attacks is masking"),
        (0, 20, "real gain", "BPDA included"),
        (30, 0, "gradient masking", "none of the gain is left"),
        (30, 4, "gradient masking", "what is left in the worst case is not clear of zero"),
        (30, -4, "gradient masking", "none of the gain is left"),
        (10, 5, "no difference", "a gain under the plain attacks alone"),  # 5 examples went missing: nobody can say why
        (30, -20, "gradient masking", "below the base model"),
        (0, -20, "worse", "below the base model"),
        (-30, -20, "worse", "below the base model"),
        (0, 0, "no difference", "lies inside -2.00 to +2.00"),
        (3, -3, "no difference", "lies inside -2.00 to +2.00"),
        (-30, 0, "no difference", "lies inside -2.00 to +2.00"),
        (6, 5, "no difference", "a gain under the plain attacks alone"),
        (0, -5, "no difference", "lies inside -2.00 to +2.00"),
    ],
)
def test_the_verdict(plain: int, worst: int, name: str, words: str) -> None:
    found = verdict(
        base_plain=outcomes(500),
        sparsified_plain=outcomes(500 + plain),
        base_worst=outcomes(490),
        sparsified_worst=outcomes(490 + worst),
    )
    assert found.name == name
    assert words in found.reason
    assert f"{plain / 10:+.2f}" in found.reason
    assert f"{worst / 10:+.2f}" in found.reason


def test_many_flips_both_ways_are_no_gain() -> None:
    base = outcomes(500)
    mine = base.copy()
    mine[450:500], mine[500:560] = False, True  # 60 gained, 50 lost: +1.0 ± 1.0 points
    same = {"base_plain": base, "sparsified_plain": mine, "base_worst": base, "sparsified_worst": mine}
    assert verdict(**same).name == "inconclusive"  # -1.06 to +3.05
    assert verdict(**same, margin=0.04).name == "no difference"


@pytest.mark.parametrize(
    ("n", "gained", "lost", "needed"),
    [
        (40, 0, 0, 96),  # 1.96 / (n + 2) < 0.02
        (10, 1, 0, 60),  # 6 changes, all to one side
        (1000, 60, 50, 4149),  # 1.96 sqrt(0.1099 / n) < 0.01, the nearer of zero and of the margin
    ],
)
def test_so_many_examples_would_tell(n: int, gained: int, lost: int, needed: int) -> None:
    found = examples_to_tell(PairedDifference((gained - lost) / n, 0.0, gained, lost, n), MARGIN)
    assert found == pytest.approx(needed, rel=0.03)
    reached = PairedDifference((gained - lost) / n, 0.0, round(gained * found / n), round(lost * found / n), found)
    assert reached.is_clear or is_inside(reached.interval_95, MARGIN)


def test_without_bpda_no_gain_is_called_real() -> None:
    found = verdict(
        base_plain=outcomes(500),
        sparsified_plain=outcomes(530),
        base_worst=outcomes(500),
        sparsified_worst=outcomes(530),
        bpda_was_run=False,
    )
    assert found.name == "unproven gain"
    assert "masking is not ruled out" in found.reason


@pytest.mark.parametrize(("n_right", "name"), [(500, "no difference"), (450, "worse")])
def test_any_other_verdict_says_so_too(n_right: int, name: str) -> None:
    same = {"base_plain": outcomes(500), "base_worst": outcomes(500)}
    mine = {"sparsified_plain": outcomes(n_right), "sparsified_worst": outcomes(n_right)}
    without, beside = (verdict(**same, **mine, bpda_was_run=ran) for ran in (False, True))
    assert without.name == beside.name == name
    assert without.reason == f"{beside.reason}; no BPDA attack was run"
