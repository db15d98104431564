"""The rule that chooses alpha, the error bars behind it, and racing, on outcomes whose answer is known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from meansparse_cli.errors import ConfigError
from meansparse_cli.ledger import Decisions
from meansparse_cli.selection.choice import ChoiceRule, SweepPoint, choose
from meansparse_cli.selection.racing import Race, behind, history_in, keep_history
from meansparse_cli.stats.multiple import adjusted_p, critical_value, examples_to_tell, is_clear


def right(n_right: int, n: int = 1000) -> Tensor:
    return torch.arange(n) < n_right


def point(alpha: float, clean: int, plain: int, worst: int, n: int = 1000) -> SweepPoint:
    return SweepPoint(alpha, right(clean, n), right(plain, n), right(worst, n), right(worst, n))


POINTS = [point(0.0, 700, 400, 400), point(0.1, 699, 420, 402), point(0.2, 698, 430, 380), point(0.3, 690, 450, 370)]


def test_the_papers_rule_takes_the_best_plain_alpha_that_keeps_clean_accuracy() -> None:
    assert choose(POINTS, ChoiceRule("apgd-ce", 0.005)).alpha == 0.2
    loose = choose(POINTS, ChoiceRule("apgd-ce", 0.010))
    assert (loose.alpha, loose.gain, loose.is_clear, loose.runner_up) == (0.3, 0.05, True, 0.2)
    assert choose(POINTS, ChoiceRule("apgd-ce", 0.0)).alpha == 0
    assert "no gain found" in choose(POINTS, ChoiceRule("apgd-ce", 0.0)).reason


def test_in_the_worst_case_two_examples_are_no_gain() -> None:
    choice = choose(POINTS, ChoiceRule("worst", 0.005))
    assert (choice.alpha, choice.best, choice.gain) == (0.0, 0.1, 0.002)
    assert choice.reason.startswith("alpha = 0: no gain found; the best, alpha = 0.1")
    assert choose(POINTS, ChoiceRule("worst", 0.005, min_gain=0.0)).alpha == 0.1
    assert choose(POINTS, ChoiceRule("worst", 0.005, min_gain=1.5)).alpha == 0.0  # sqrt(2) standard errors
    assert choose(POINTS, ChoiceRule("worst", 0.005, min_gain=1.4)).alpha == 0.1


def test_ties_go_to_the_smaller_alpha_and_dropped_alphas_do_not_run() -> None:
    level = [point(0.0, 700, 400, 400), point(0.1, 700, 420, 400), point(0.2, 700, 420, 400)]
    assert choose(level, ChoiceRule("apgd-ce", 0.005)).alpha == 0.1
    dropped = SweepPoint(0.3, right(700), right(300, 300), right(300, 300), right(300, 300))
    choice = choose([*level, dropped], ChoiceRule("apgd-ce", 0.005))
    assert choice.alpha == 0.1
    assert "1 alpha dropped by racing" in choice.reason


def test_a_rule_reads_as_one_sentence_and_unknown_objectives_are_refused() -> None:
    words = ChoiceRule("apgd-ce", 0.005, attacks=("apgd-ce",)).in_words()
    assert "under apgd-ce" in words and "at most 0.5 points" in words and "smaller alpha" in words
    assert "critical value" in ChoiceRule("worst", 0.005).in_words()
    with pytest.raises(ConfigError, match="objective"):
        ChoiceRule("autoattack", 0.005)


def test_report_of_a_point_pairs_with_the_same_examples_of_the_base() -> None:
    short = SweepPoint(0.3, right(690), right(40, 100), right(30, 100), right(20, 100))
    row = short.to_report(POINTS[0])
    assert row["plain"]["n_examples"] == 100
    assert row["plain"]["minus_base"] == pytest.approx(-0.6)  # all of the first 100 are right on the base
    assert row["clean"]["minus_base"] == pytest.approx(-0.01)


def _outcomes(rng: np.random.Generator, n: int, n_alphas: int, flips: float) -> tuple[list[np.ndarray], np.ndarray]:
    """A base, and alphas that flip examples of it to either side with equal chance: no alpha is better."""
    base = rng.random(n) < 0.5
    return [np.where(rng.random(n) < flips, rng.random(n) < 0.5, base) for _ in range(n_alphas)], base


def test_the_simultaneous_value_keeps_its_error_rate_and_beats_bonferroni_for_alphas_that_agree() -> None:
    rng, n_false = np.random.default_rng(0), 0
    for seed in range(100):
        alphas, base = _outcomes(rng, 200, 8, 0.2)
        critical = critical_value([(a, base) for a in alphas], seed=seed)
        n_false += any(is_clear(a, base, critical) for a in alphas)
    assert n_false <= 11  # 5 expected; 12 or more has a probability below 0.5 %
    alphas, base = _outcomes(rng, 400, 8, 0.2)
    assert 2.5 < critical_value([(a, base) for a in alphas]) < 2.9  # independent: near Bonferroni's 2.73
    assert critical_value([(alphas[0], base)] * 8) == pytest.approx(1.96, abs=0.06)  # one and the same eight times
    assert critical_value([(base, base)]) == pytest.approx(1.96, abs=0.01)


def test_exact_p_and_the_number_of_examples() -> None:
    base, mine = right(400), right(410)  # ten gained, none lost
    assert adjusted_p(mine, base, 1) == pytest.approx(2 / 2**10)
    assert adjusted_p(mine, base, 4) == pytest.approx(8 / 2**10)
    assert adjusted_p(base, base, 4) == 1
    n = examples_to_tell(mine, base)
    assert n == math.ceil((1.959964 + 0.841621) ** 2 * (0.01 - 0.0001) / 0.0001)
    assert examples_to_tell(base, base) is None


BASE, A, B = (0.0,), (0.1,), (0.2,)


def test_racing_drops_what_is_far_behind_and_never_the_base_nor_on_few_examples() -> None:
    masks = {BASE: right(20, 100), A: right(60, 100), B: right(30, 100)}
    (drop,) = behind(masks, BASE, n_final=500, look=1)
    assert (drop.column, drop.n_examples) == (B, 100)
    assert drop.difference == pytest.approx(-0.3)
    assert behind({c: m[:40] for c, m in masks.items()}, BASE, n_final=500, look=1) == []
    assert behind({BASE: right(50, 100), A: right(51, 100)}, BASE, n_final=500, look=1) == []
    assert behind(masks, BASE, n_final=100, look=1) == [], "after the last example there is nothing left to save"


def test_later_looks_ask_for_more() -> None:
    masks = {BASE: right(20, 100), A: right(60, 100), B: right(48, 100)}
    bounds = [behind(masks, BASE, n_final=10_000, look=look) for look in (1, 1000)]
    assert len(bounds[0]) == 1 and bounds[1] == []


def test_a_race_agrees_with_the_full_sweep_within_its_stated_error() -> None:
    rng, n_wrong, n_saved = np.random.default_rng(1), 0, 0
    for _ in range(150):
        n, columns = 400, [(a / 10,) for a in range(6)]
        base = rng.random(n) < 0.45
        full = {BASE: base}
        for i, column in enumerate(columns[1:]):
            chance = rng.random(n)  # some gained, some lost, by alpha
            full[column] = (base & (chance > 0.02 * (i + 1))) | (~base & (chance < 0.015 * (i + 1)))
        race = Race(columns, BASE, n, lambda column, full=full: full[column])
        for n_seen in range(50, n, 50):
            race.look(n_seen)
            n_saved += 50 * (len(columns) - len(race.running))
        best, chosen = (max(pool, key=lambda c: (full[c].sum(), -c[0])) for pool in (columns, race.running))
        differences = full[best].astype(float) - full[chosen].astype(float)
        n_wrong += differences.mean() > max(1e-12, 1.05 * math.sqrt((differences.var() + 1 / n) / n))
    assert n_wrong <= 12  # stated: at most 5 % of 150
    assert n_saved > 150 * 300, "else racing saved next to nothing"


def test_the_decisions_of_a_race_survive_and_are_not_taken_again(tmp_path: Path) -> None:
    masks = {BASE: right(20, 200), A: right(60, 200), B: right(30, 200)}
    race = Race([BASE, A, B], BASE, 400, lambda column: masks[column])
    assert [drop.column for drop in race.look(100)] == [B]
    told = list[str]()
    keep_history(Decisions(tmp_path / "race.json", told.append), {"plain": race})
    masks[B] = right(200, 200)  # what happened since does not matter
    history = history_in(Decisions(tmp_path / "race.json", told.append), "plain")
    again = Race([BASE, A, B], BASE, 400, lambda column: masks[column], history)
    again.look(100)
    assert again.running == [BASE, A]
    assert again.drops == race.drops
    assert history_in(Decisions(tmp_path / "none.json", told.append), "plain") == []
    (tmp_path / "race.json").write_text("{")
    assert Decisions(tmp_path / "race.json", told.append).entries == {} and "race.json is damaged" in told.pop()
    assert not told and (tmp_path / "race.json.damaged").read_text() == "{"
