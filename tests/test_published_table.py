"""The table of published MeanSparse models in the README and on the headline page is what ``published.json`` says.

After a change of the data: ``python tests/test_published_table.py --write``.
"""

import re
import sys
from pathlib import Path

import pytest

from meansparse_cli.models.names import package_data
from meansparse_cli.models.published import PublishedModel, published_models

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "results" / "headline.md"]
WRITE = "python tests/test_published_table.py --write"
BEGIN, END = f"<!-- table: {WRITE} -->\n\n", "\n<!-- end of table -->"
BLOCK = re.compile(re.escape(BEGIN) + r"(.*?)" + re.escape(END), re.DOTALL)
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}
HEAD = "| model | base, AutoAttack % | MeanSparse, AutoAttack % | MeanSparse, BPDA % | BPDA - base, points |"


def card(name: str, like: dict[str, str]) -> PublishedModel:
    """The card of a model for the data set and threat of a zoo entry."""
    key = (name, like["dataset"], like["threat"])
    (found,) = (model for model in published_models() if (model.name, model.dataset, model.threat) == key)
    return found


def pairs() -> list[tuple[PublishedModel, PublishedModel]]:
    """(base, MeanSparse) for each card of a MeanSparse model, once, in the order of ``zoo.yaml``."""
    with_card = [row for row in package_data("zoo.yaml")["published"] if row["entry"]]
    found = [(card(row["base"], row), card(row["entry"], row)) for row in with_card]
    return list(dict.fromkeys(found))


def in_percent(fraction: float | None) -> float:
    assert fraction is not None
    return round(100 * fraction, 2)


def line(base: PublishedModel, sparse: PublishedModel) -> str:
    before, claimed = in_percent(base.autoattack_accuracy), in_percent(sparse.autoattack_accuracy)
    under_bpda = in_percent(sparse.external_accuracy)
    name = f"{DATASETS[base.dataset]} {base.threat}, {base.architecture}"
    return f"| {name} | {before:.2f} | {claimed:.2f} | {under_bpda:.2f} | **{under_bpda - before:+.2f}** |"


def table() -> str:
    return "\n".join([HEAD, "|---|---|---|---|---|", *(line(*pair) for pair in pairs())]) + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_table_on_page_is_that_of_the_data(page: Path) -> None:
    assert BLOCK.findall(page.read_text()) == [table()], f"{page} differs from published.json: {WRITE}"


def test_every_published_meansparse_model_is_in_the_table_and_known_figures_stand_there() -> None:
    cards = {model for model in published_models() if model.name.startswith("Amini2024MeanSparse_")}
    assert {sparse for _, sparse in pairs()} == cards and len(cards) == 6
    assert "| CIFAR-10 Linf, WideResNet-94-16 | 73.71 | 75.28 | 73.10 | **-0.61** |" in table()
    assert "| ImageNet Linf, ConvNeXt-L | 58.48 | 59.64 | 58.22 | **-0.26** |" in table()


def test_two_headline_models_have_no_card() -> None:
    without = [row["name"] for row in package_data("zoo.yaml")["published"] if not row["entry"]]
    assert without == ["WRN-70-16", "RaWRN-101-2"]


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    for page in PAGES:
        page.write_text(BLOCK.sub(lambda _: BEGIN + table() + END, page.read_text()))
