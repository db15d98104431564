"""``meansparse table summary``: what became of the paper's claims, on one page, from the tables that lie in a folder.

Reads the ``tableN.yaml`` that ``meansparse table N`` wrote, so it says what they say and nothing else. The page is the
folder's ``README.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from ..errors import ArtifactError, ConfigError
from ..reporting.table import Table
from .claims import Answer, Judgement, with_error
from .page import render
from .tables import Claim, in_paper, paper_table, table_names

ANSWERS: tuple[Answer, ...] = get_args(Answer)
MEASURES = ("under the paper's attack", "clean accuracy", "in the worst case, BPDA included")
HEADER = ("table", "what the paper says", "paper", "ours", "worst case", "images")


@dataclass(frozen=True)
class SummaryRow:
    """A claim of table ``number`` and its judgements; ``worst`` is None for a claim on clean accuracy."""

    number: str
    claim: Claim
    own: Judgement
    worst: Judgement | None

    @property
    def measures(self) -> list[tuple[str, Judgement]]:
        """What of ``MEASURES`` it was judged by."""
        own = MEASURES[self.claim.measure == "clean"]
        return [(own, self.own), *([(MEASURES[2], self.worst)] if self.worst is not None else [])]

    @property
    def was_run(self) -> bool:
        """Was it judged at all?"""
        return any(judgement.answer != "not run" for _, judgement in self.measures)


def table_file(folder: Path, number: str) -> Path:
    """Where ``meansparse table`` writes a table as YAML; the page lies beside it as ``.md``."""
    return folder / (f"table{number}.yaml" if number.isdecimal() else f"{number}.yaml")


def summary_page(folder: Path, *, command: str) -> str:
    """The page, as Markdown. Raises ConfigError where there is no table, ArtifactError for a file that is none."""
    there = {n: _read(file) for n in table_names() if (file := table_file(folder, n)).exists()}
    if not there:
        raise ConfigError(f"no table lies in {folder}", hint="meansparse table 3 RUN writes one; make table3")
    rows = [row for number, content in there.items() for row in _rows(number, content, table_file(folder, number))]
    judged = [row for row in rows if row.was_run]
    # apart from the rest, as some claims are of a loss, and of those it is no good news that they hold
    gains = [row for row in judged if row.worst is not None and paper_table(row.number).is_of_a_gain(row.claim)]
    return render(
        "summary.md",
        command=command,
        data=sorted({content["data"] for content in there.values() if content.get("data")}),
        others=sorted(name for name, is_own in _models(there).items() if not is_own),
        counts=_counts(rows).to_markdown(),
        gains=gains,
        own=Counter(row.own.answer for row in gains),
        worst=Counter(row.worst.answer for row in gains if row.worst is not None),
        absent=[in_paper(number) for number in table_names() if number not in there],
        claims=Table("", HEADER, [_line(row) for row in judged], kinds="t" * len(HEADER)).to_markdown(),
        left_out=Counter(in_paper(row.number) for row in rows if not row.was_run),
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
            rows.append(SummaryRow(number, claim, own, worst))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file} was written by another version", hint=f"write it again: meansparse table {number} RUN..."
        ) from error
    return rows


def _models(contents: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Our models, and whether each is the paper's wherever it stands."""
    ours: dict[str, bool] = {}
    for content in contents.values():
        for found in [*content.get("columns", {}).values(), content]:  # the table of subsets has one model
            if found.get("model"):
                ours[found["model"]] = ours.get(found["model"], True) and found["is_the_papers_model"]
    return ours


def _counts(rows: Sequence[SummaryRow]) -> Table:
    counts = {name: Counter(j.answer for row in rows for m, j in row.measures if m == name) for name in MEASURES}
    cells = [(name, *(f"{count[answer]}" for answer in ANSWERS)) for name, count in counts.items() if count]
    return Table("", ("claims", *ANSWERS), cells, kinds="t" * (len(ANSWERS) + 1))


def _line(row: SummaryRow) -> tuple[str, ...]:
    name = row.number if row.number.isdecimal() else in_paper(row.number)
    text = row.claim.sentence + (f"; here: `{row.own.stand_in}`" if row.own.stand_in else "")
    n = next((f"{j.n_examples:,}" for _, j in row.measures if j.n_examples is not None), "")
    page = table_file(Path(), row.number).with_suffix(".md")
    return f"[{name}]({page})", text, row.claim.number(row.own.paper), _cell(row.own), _cell(row.worst), n


def _cell(judgement: Judgement | None) -> str:
    if judgement is None or judgement.ours is None:
        return "" if judgement is None else judgement.answer
    answer = judgement.answer if judgement.answer == "inconclusive" else f"**{judgement.answer}**"
    return f"{answer}: {with_error(judgement)}"
