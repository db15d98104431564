"""The paper's cells as data: how many there are, what they say of each other, and that our options can be in them."""

from fractions import Fraction

import pytest

from meansparse_cli.attacks import expand_attacks
from meansparse_cli.errors import ConfigError
from meansparse_cli.paper.tables import paper_table, table_names
from meansparse_cli.settings.values import parse_alphas, parse_eps
from meansparse_cli.sites.rules import parse_rule

N_CELLS = {
    "1": 54, "2": 54, "3": 18, "4": 9, "5": 9, "6": 18, "7": 24, "8": 27, "9": 48, "10": 68, "11": 18, "12": 10,
    "headline": 16, "subset": 16,
}  # fmt: skip


def robust(table: str, column: str, row: str) -> float:
    return paper_table(table).cell(column, row).robust


def test_no_cell_is_missing() -> None:
    assert {name: sum(len(c.cells) for c in paper_table(name).columns) for name in table_names()} == N_CELLS


def test_a_cell_has_the_printed_numbers_as_fractions() -> None:
    cell = paper_table("5").cell("Adaptive-(2,2)", "0.35")
    assert (cell.clean, cell.robust) == (0.8351, 0.5526)
    assert cell.where["attack"] == "adaptive-2-2"
    assert paper_table("9").cell("alpha 0.2", "16/255").clean is None
    assert paper_table("9").column("alpha 0.2").clean == 0.8432
    assert paper_table("subset").cell("WRN-94-16", "0.1").clean == 0.1286
    assert paper_table("10").cell("base", "0").robust == 0.4912


@pytest.mark.parametrize("alpha", ["0", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4"])
def test_tables_of_the_same_model_agree(alpha: str) -> None:
    assert (
        robust("2", "gelu", alpha)
        == robust("3", "Linf", alpha)
        == robust("6", "pgd", alpha)
        == robust("8", "channel mean", alpha)
    )


def test_tables_of_the_same_setting_agree() -> None:
    for alpha in ("0", "0.2", "0.35"):
        assert robust("9", f"alpha {alpha}", "8/255") == robust("3", "Linf", alpha)
    for alpha in ("0.2", "0.35"):
        assert robust("10", f"cumulative {alpha}", "16") == robust("3", "Linf", alpha)


def test_sites_of_table_10_are_rules() -> None:
    table = paper_table("10")
    assert table.cell("single 0.2", "3").where["sites"] == "single:3"
    assert table.cell("cumulative 0.35", "8").where["sites"] == "first:9"


@pytest.mark.parametrize("name", [name for name in table_names() if name != "subset"])
def test_every_cell_can_be_measured(name: str) -> None:
    """Its attack, alpha, eps and sites are what our options take."""
    for column in paper_table(name).columns:
        for cell in column.cells:
            assert set(cell.where) == {"attack", "alpha", "eps", "norm", "sites", "centre", "split"}, cell
            expand_attacks([cell.where["attack"]])
            parse_alphas(cell.where["alpha"])
            parse_eps(cell.where["eps"])
            parse_rule(cell.where["sites"])
            assert 0 <= cell.robust <= 1 and (cell.clean is None or cell.robust <= cell.clean <= 1)


@pytest.mark.parametrize("name", [name for name in table_names() if name != "subset"])
def test_the_papers_own_numbers_bear_out_its_claims(name: str) -> None:
    table = paper_table(name)
    assert table.claims
    for claim in table.claims:
        cells = {place: table.cell(*place) for place in claim.terms}
        value = sum(
            w * (cells[p].clean if claim.measure == "clean" else cells[p].robust) for p, w in claim.terms.items()
        )  # type: ignore[operator]
        assert value < claim.bound if claim.is_below else value > claim.bound, claim.text


def test_a_bound_other_than_zero_is_of_one_cell_or_of_a_pair() -> None:
    """What the tests behind the answers can do."""
    for name in table_names():
        for claim in paper_table(name).claims:
            assert not claim.bound or sorted(claim.terms.values()) in ([1.0], [-1.0, 1.0]), claim.text


def test_a_claim_about_every_column_names_each() -> None:
    texts = [claim.text for claim in paper_table("12").claims]
    assert len(texts) == 5 and texts[0].endswith("(WRN-94-16)")
    assert ("WRN-94-16", "sparsified") in paper_table("12").claims[0].terms
    assert paper_table("12").cell("WRN-94-16", "sparsified").where["alpha"] == "0.15"


def test_headline_alphas_and_budgets() -> None:
    found = {
        c.name: (c.cells[1].where["alpha"], Fraction(c.cells[1].where["eps"])) for c in paper_table("headline").columns
    }
    assert found["L2 WRN-70-16"] == ("0.25", Fraction(1, 2))
    assert found["ImageNet Swin-L"] == ("0.1", Fraction(4, 255))


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no table '13'"):
        paper_table("13")
    with pytest.raises(ConfigError, match="no column 'mish'"):
        paper_table("2").column("mish")


def test_claims_of_a_gain_are_told_from_the_others() -> None:
    table = paper_table("9")
    others = [claim.text for claim in table.claims if not table.is_of_a_gain(claim)]
    assert len(others) == 3 and all("below the base model" in text for text in others)
    table = paper_table("8")
    assert not any(table.is_of_a_gain(claim) for claim in table.claims if "more" in claim.text)
    assert not any(paper_table("subset").is_of_a_gain(claim) for claim in paper_table("subset").claims)
    # one that asks for more than two points, and one whose base is another model
    assert [
        c.text for c in paper_table("3").claims if c.measure == "robust" and not paper_table("3").is_of_a_gain(c)
    ] == ["at alpha 0.35 more than two points of robustness are gained"]
    headline = paper_table("headline")
    assert sum(headline.is_of_a_gain(claim) for claim in headline.claims) == 8
    for number in ("2", "12"):
        table = paper_table(number)
        assert all(table.is_of_a_gain(claim) for claim in table.claims if claim.measure == "robust")
