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
from .claims import RULE, Answer, Judgement, number_of
from .tables import Claim, in_paper, paper_table, table_names

ANSWERS: tuple[Answer, ...] = get_args(Answer)
MEASURES = ("under the paper's attack", "clean accuracy", "in the worst case, BPDA included")


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


def table_file(folder: Path, number: str) -> Path:
    """Where ``meansparse table`` writes a table as YAML; the page lies beside it as ``.md``."""
    return folder / (f"table{number}.yaml" if number.isdecimal() else f"{number}.yaml")


def summary_page(folder: Path, *, command: str) -> str:
    """The page, as Markdown. Raises ConfigError where the folder holds no table, ArtifactError for a table that is none."""
    contents = {number: _read(table_file(folder, number)) for number in table_names()}
    there = {number: content for number, content in contents.items() if content is not None}
    if not there:
        raise ConfigError(f"no table lies in {folder}", hint="meansparse table 3 RUN writes one; make table3")
    rows = [row for number, content in there.items() for row in _rows(number, content, table_file(folder, number))]
    judged = [row for row in rows if any(j.answer != "not run" for _, j in row.measures)]
    left_out = Counter(in_paper(row.number) for row in rows if row not in judged)
    lines = ["# What the paper claims, and what we find", "", *_models(there), "", *_counts(rows), ""]
    lines += [_gains(judged), ""]
    if absent := [in_paper(number) for number in contents if number not in there]:
        lines += [f"No page here, and so none of their claims: {', '.join(absent)}.", ""]
    lines += ["| table | what the paper says | paper | ours | worst case | images |", "|" + "---|" * 6]
    lines += [_line(row) for row in judged]
    if left_out:
        of = ", ".join(f"{n} of {name}" for name, n in left_out.items())
        lines += [
            "",
            f"Not run, and so not listed: {sum(left_out.values())} claims ({of}).",
        ]
    lines += ["", f"Rule: {RULE}.", "", "```console", command, "```", ""]
    return "\n".join(lines)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return dict(content)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file} is not a table", hint="write it again: meansparse table N RUN...") from error


def _rows(number: str, content: dict[str, Any], file: Path) -> list[SummaryRow]:
    rows = []
    try:
        for claim, found in zip(paper_table(number).claims, content["claims"], strict=True):
            if found["text"] != claim.text:
                raise ValueError(found["text"])
            own = Judgement(claim, **_judgement(found["under_its_attack"]))
            worst = Judgement(claim, **_judgement(found["worst_case"])) if "worst_case" in found else None
            rows.append(SummaryRow(number, claim, own, worst))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file} was written by another version", hint=f"write it again: meansparse table {number} RUN..."
        ) from error
    return rows


def _judgement(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "answer": found["answer"], "paper": found["paper"], "value": found["ours"], "standard_error": found["standard_error"],
        "n": found["n_examples"], "why": found["why"], "stand_in": found["stand_in"],
    }  # fmt: skip


def _models(contents: dict[str, dict[str, Any]]) -> list[str]:
    """What was measured, and that it is not the paper's where that is so."""
    ours: dict[str, bool] = {}
    for content in contents.values():
        for column in content.get("columns", {}).values():
            if column["model"]:
                ours[column["model"]] = ours.get(column["model"], True) and column["is_the_papers_model"]
        if "model" in content:  # the table of subsets
            ours[content["model"]] = ours.get(content["model"], True) and content["is_the_papers_model"]
    data = {content["data"] for content in contents.values() if content.get("data")}
    lines = [
        "A number is the sum of accuracies that a claim is about. The claim holds where it lies beyond its bound, which is 0 where "
        "the claim names none. The sentence of a claim, and the commands behind its numbers, stand on the page of its table."
    ]
    if data:
        lines[0] += f" Data: {'; '.join(sorted(data))}."
    others = ", ".join(f"`{name}`" for name, is_own in sorted(ours.items()) if not is_own)
    if others:
        lines += ["", f"**Other models than the paper's**, in their place: {others}."]
    return lines


def _counts(rows: Sequence[SummaryRow]) -> list[str]:
    lines = [f"| claims | {' | '.join(ANSWERS)} |", "|" + "---|" * (len(ANSWERS) + 1)]
    for measure in MEASURES:
        counts = Counter(j.answer for row in rows for name, j in row.measures if name == measure)
        if counts:
            lines.append(f"| {measure} | {' | '.join(f'{counts[answer]}' for answer in ANSWERS)} |")
    return lines


def _gains(rows: Sequence[SummaryRow]) -> str:
    """Apart from the rest, as some claims are of a loss, and of those it is no good news that they hold."""
    gains = [row for row in rows if row.worst is not None and paper_table(row.number).is_of_a_gain(row.claim)]
    own = Counter(row.own.answer for row in gains)
    worst = Counter(row.worst.answer for row in gains if row.worst is not None)
    return (
        f"Of the {len(gains)} claims here that MeanSparse is more robust than its base model, {own['confirmed']} are confirmed and "
        f"{own['contradicted']} contradicted under the paper's attack, and in the worst case {worst['confirmed']} and "
        f"{worst['contradicted']}. Claims of several tables can rest on one measurement, so they do not count as independent."
    )


def _line(row: SummaryRow) -> str:
    name = row.number if row.number.isdecimal() else in_paper(row.number)
    page = table_file(Path(), row.number).with_suffix(".md")
    text = row.claim.text[0].upper() + row.claim.text[1:]
    text += f"; here: `{row.own.stand_in}`" if row.own.stand_in else ""
    worst = "" if row.worst is None else _cell(row.worst)
    n = next((j.n for _, j in row.measures if j.n is not None), None)
    cells = [
        f"[{name}]({page})", text, number_of(row.own.paper, row.claim), _cell(row.own), worst, "" if n is None else f"{n:,}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _cell(judgement: Judgement) -> str:
    if judgement.value is None or judgement.standard_error is None:
        return judgement.answer
    number = f"{number_of(judgement.value, judgement.claim)} ± {100 * judgement.standard_error:.2f}"
    return (
        f"**{judgement.answer}**: {number}" if judgement.answer != "inconclusive" else f"{judgement.answer}: {number}"
    )
