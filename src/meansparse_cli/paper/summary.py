"""``meansparse table summary``: what became of the paper's claims, on one page, from the tables that lie in a folder.

Reads the ``tableN.yaml`` that ``meansparse table N`` wrote, so it says what they say and nothing else. The page is the
folder's ``README.md``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from ..errors import ArtifactError, ConfigError
from .claims import Answer, Judgement
from .page import render
from .tables import in_paper, paper_table, table_names

ANSWERS: tuple[Answer, ...] = get_args(Answer)
MEASURES = ("under the paper's attack", "clean accuracy", "in the worst case, BPDA included")


@dataclass(frozen=True)
class SummaryRow:
    """A claim of table ``number`` and its judgements; ``worst`` is None for a claim on clean accuracy."""

    number: str
    own: Judgement
    worst: Judgement | None

    @property
    def measures(self) -> list[tuple[str, Judgement]]:
        """What of ``MEASURES`` it was judged by."""
        own = (MEASURES[self.own.claim.measure == "clean"], self.own)
        return [own] if self.worst is None else [own, (MEASURES[2], self.worst)]

    @property
    def name(self) -> str:
        """Of its table; ``page``: the table's, beside this one."""
        return self.number if self.number.isdecimal() else in_paper(self.number)

    @property
    def page(self) -> Path:
        return table_file(Path(), self.number).with_suffix(".md")

    @property
    def images(self) -> str:
        """On how many it was judged; nothing where it was not."""
        return next((f"{found.n_examples:,}" for _, found in self.measures if found.n_examples is not None), "")


def table_file(folder: Path, number: str) -> Path:
    """Where ``meansparse table`` writes a table as YAML; the page lies beside it as ``.md``."""
    return folder / (f"table{number}.yaml" if number.isdecimal() else f"{number}.yaml")


def summary_page(folder: Path, *, command: str) -> str:
    """The page, as Markdown. Raises ConfigError where there is no table, ArtifactError for a file that is none."""
    there = {n: _read(file) for n in table_names() if (file := table_file(folder, n)).exists()}
    if not there:
        raise ConfigError(f"no table lies in {folder}", hint="meansparse table 3 RUN writes one; make table3")
    rows = [row for number, content in there.items() for row in _rows(number, content, table_file(folder, number))]
    judged = [row for row in rows if any(found.answer != "not run" for _, found in row.measures)]
    # apart from the rest, as some claims are of a loss, and of those it is no good news that they hold
    gains = [row for row in judged if row.worst is not None and paper_table(row.number).is_of_a_gain(row.own.claim)]
    models = [found for content in there.values() for found in [*content.get("columns", {}).values(), content]]
    return render(
        "summary.md",
        command=command,
        data=sorted({content["data"] for content in there.values() if content.get("data")}),
        others=sorted({m["model"] for m in models if m.get("model") and not m["is_the_papers_model"]}),
        answers=ANSWERS,
        counts={
            name: Counter(found.answer for row in rows for m, found in row.measures if m == name) for name in MEASURES
        },
        gains=gains,
        own=Counter(row.own.answer for row in gains),
        worst=Counter(row.worst.answer for row in gains if row.worst is not None),
        absent=[in_paper(number) for number in table_names() if number not in there],
        judged=judged,
        left_out=Counter(in_paper(row.number) for row in rows if row not in judged),
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file} is not a table", hint="write it again: meansparse table N RUN...") from error


def _rows(number: str, content: dict[str, Any], file: Path) -> list[SummaryRow]:
    rows = []
    try:
        for claim, found in zip(paper_table(number).claims, content["claims"], strict=True):
            if found["text"] != claim.text:
                raise ValueError(found["text"])
            own = Judgement(claim, **found["under_its_attack"])
            worst = Judgement(claim, **found["worst_case"]) if "worst_case" in found else None
            rows.append(SummaryRow(number, own, worst))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file} was written by another version", hint=f"write it again: meansparse table {number} RUN..."
        ) from error
    return rows
