"""The paper's tables as data: every printed cell, what a result must agree with to stand beside it, and the claims.

From ``tables.yaml``, which says which version of the paper it is of. Accuracies in the YAML are in %, here fractions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Any

import yaml

from ..errors import ConfigError
from ..stats.format import in_points, percent

BASE_COLUMN = "base"
LAST = "sparsified"
NAMES = {"headline": "the headline figure", "subset": "the subset table"}
Place = tuple[str, str]
"""(column, row) of a cell."""


@dataclass(frozen=True)
class Cell:
    """``row``: the value of what the table's rows vary. ``where``: attack, norm, eps, alpha, sites, centre, split.

    ``clean`` and ``robust`` as printed, fractions; ``clean`` None where the table has none.
    """

    column: str
    row: str
    where: dict[str, str]
    clean: float | None
    robust: float

    @property
    def is_base(self) -> bool:
        return float(self.where.get("alpha", "1")) == 0


@dataclass(frozen=True)
class Column:
    """Cells of one model or setting. ``model`` and ``dataset``: of the zoo, if it is there; ``clean``: of all rows.

    ``n_examples``: how many the paper evaluated on. ``config``: the model's YAML; ``step``: what is done on its run.
    """

    name: str
    cells: tuple[Cell, ...]
    attack: str
    n_examples: int | None = None
    model: str | None = None
    dataset: str | None = None
    clean: float | None = None
    note: str = ""
    config: str | None = None
    step: str = ""


@dataclass(frozen=True)
class Claim:
    """``text`` is what the paper says; the weighted sum of the cells' accuracies lies above ``bound`` if it is true.

    ``terms``: cell -> weight; with a ``bound`` other than 0 one cell, or one minus another. ``measure`` is ``robust``,
    ``clean``, or ``attack``: robust, and about an attack, so that a worst case over all of them says nothing.
    ``is_below``: it lies below ``bound`` instead. ``paper``: the paper's own sum, where its cells do not give it.
    ``is_less``: the claim is that something is less, so people read its sum with the other sign.
    """

    text: str
    terms: dict[Place, float]
    measure: str = "robust"
    bound: float = 0.0
    is_below: bool = False
    paper: float | None = None
    is_less: bool = False

    @property
    def is_level(self) -> bool:
        return list(self.terms.values()) == [1.0]

    @property
    def sentence(self) -> str:
        return self.text[0].upper() + self.text[1:]

    def number(self, value: float) -> str:
        """A sum of accuracies as the claim means it: an accuracy in %, or a difference in points."""
        shown = 0.0 - value if self.is_less else value  # 0.0 -, not -: no minus before zero
        return f"{percent(value)} %" if self.is_level else f"{in_points(shown)} points"


@dataclass(frozen=True)
class PaperTable:
    """One table, as ``tables.yaml`` describes it. ``base``: its base model, where that stands in no column.

    ``models``: {column or "": how it was trained}.
    """

    number: str
    source: str
    title: str
    attack: str
    by: str
    columns: tuple[Column, ...]
    claims: tuple[Claim, ...]
    steps: list[str]
    base: Cell | None = None
    column_is: str | None = None
    note: str = ""
    models: dict[str, str] = field(default_factory=dict)
    in_place_of: list[str] = field(default_factory=list)

    def column(self, name: str) -> Column:
        """The column called ``name``. Raises ConfigError, with the names there are."""
        for column in self.columns:
            if column.name == name:
                return column
        names = ", ".join(column.name for column in self.columns)
        raise ConfigError(f"table {self.number} has no column {name!r}", hint=f"its columns: {names}")

    def cell(self, column: str, row: str) -> Cell:
        """One cell; ``base`` is a column of its own where the table has a base model that stands in no column."""
        if column == BASE_COLUMN:
            assert self.base is not None
            return self.base
        cells = {cell.row: cell for cell in self.column(column).cells}
        return list(cells.values())[-1] if row == LAST else cells[row]

    def gain(self, cell: Cell) -> float | None:
        """The paper's, over the base model of the cell's column, else of its row, else of the table; None of a base."""
        bases = [c for column in self.columns for c in column.cells if c.is_base]
        near = [b for b in bases if b.column == cell.column] + [b for b in bases if b.row == cell.row]
        base = next(iter(near), self.base)
        return None if cell.is_base or base is None else cell.robust - base.robust

    def is_of_a_gain(self, claim: Claim) -> bool:
        """Is the claim that MeanSparse is above its base model, by however little, and not above another variant?"""
        if self.by == "fraction" or claim.bound:  # fraction: of the images for the statistics, all at one alpha
            return False
        if len({self.column(name).model for name, _ in claim.terms if name != BASE_COLUMN}) > 1:
            return False
        alphas = [(weight, Fraction(self.cell(*place).where["alpha"])) for place, weight in claim.terms.items()]
        return not claim.is_below and len(alphas) > 1 and all((alpha > 0) == (weight > 0) for weight, alpha in alphas)


@cache
def content() -> dict[str, Any]:
    text = (resources.files(__package__) / "tables.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def table_names() -> list[str]:
    """``1`` to ``12``, ``headline`` and ``subset``."""
    return list(content()["tables"])


def in_paper(number: str) -> str:
    """How a table is called: ``Table 3``, ``the headline figure``."""
    return NAMES.get(number, f"Table {number}")


@cache
def paper_table(number: str) -> PaperTable:
    """The table of that number or name. Raises ConfigError where there is none."""
    if number not in content()["tables"]:
        raise ConfigError(f"the paper has no table {number!r}", hint=f"one of {', '.join(table_names())}")
    raw = content()["tables"][number]
    columns = tuple(_column(name, column, raw) for name, column in raw["columns"].items())
    base = _cell(BASE_COLUMN, "0", raw["where"] | {"alpha": 0}, raw["base"], 1 / 100) if "base" in raw else None
    claims = tuple(claim for item in raw["claims"] for claim in _claims(item, columns))
    as_it_is = {key: raw[key] for key in raw.keys() - {"where", "n_examples", "columns", "base", "claims"}}
    return PaperTable(number, content()["source"], columns=columns, claims=claims, base=base, **as_it_is)


def _column(name: str, raw: Mapping[str, Any], table: Mapping[str, Any]) -> Column:
    cells = []
    for row, values in raw["cells"].items():
        where = table["where"] | raw.get("where", {})
        if table["by"] == "index":  # of a site, as in ``meansparse sites``
            where["sites"] = where["sites"].format(i=row, n=row + 1)
        else:
            where[table["by"]] = row
        cells.append(_cell(name, f"{row}", where, values, 1.0 if table["by"] == "fraction" else 1 / 100))
    given = {"attack": table["attack"], "n_examples": table.get("n_examples"), **raw}
    as_it_is = {key: given[key] for key in given.keys() - {"where", "cells", "clean"}}
    return Column(name, tuple(cells), clean=raw["clean"] / 100 if "clean" in raw else None, **as_it_is)


def _cell(column: str, row: str, where: Mapping[str, Any], values: Any, scale: float) -> Cell:
    clean, robust = values if isinstance(values, list) else (None, values)
    texts = {key: f"{value}" for key, value in where.items()}
    # rounded: 84.59 -> 0.8459, not 0.8459000000000001
    return Cell(column, row, texts, None if clean is None else round(clean * scale, 6), round(robust * scale, 6))


def _claims(raw: Mapping[str, Any], columns: tuple[Column, ...]) -> list[Claim]:
    bound = raw.get("at_most", raw.get("at_least", 0.0)) / 100
    paper = raw["paper"] / 100 if "paper" in raw else None
    rest = (raw.get("of", "robust"), bound, "at_most" in raw, paper, raw.get("reads") == "less")
    weights = {f"{key}": float(weight) for key, weight in raw["holds"].items()}
    if "columns" not in raw:
        places = {(key.partition("/")[0], key.partition("/")[2]): weight for key, weight in weights.items()}
        return [Claim(raw["text"], places, *rest)]
    names = [column.name for column in columns if fnmatchcase(column.name, raw["columns"])]
    return [Claim(f"{raw['text']} ({n})", {(n, row): w for row, w in weights.items()}, *rest) for n in names]
