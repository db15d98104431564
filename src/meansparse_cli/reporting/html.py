"""One HTML page for a run, with everything inside: no script, no font, no picture from elsewhere; light and dark."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..engine.evaluation import MODELS
from .tables import TextTable, doubt_sentences, doubts_of, doubts_table

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --page: #fff; --card: #f6f8fa; --line: #d1d9e0;
  --base: #0072b2; --sparsified: #d55e00; --warn: #b3261e; --pass: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --page: #0d1117; --card: #161b22;
  --line: #30363d; --base: #56b4e9; --sparsified: #e69f00; --warn: #ff7b72; --pass: #56d364; } }
body { margin: 2.5rem auto; max-width: 60rem; padding: 0 1.25rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.about { color: var(--soft); margin: 0; }
p.verdict { background: var(--card); border-left: 4px solid var(--soft); padding: .7rem 1rem; margin: 1.2rem 0; }
p.verdict.good { border-color: var(--pass); } p.verdict.bad { border-color: var(--warn); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr.strong td { font-weight: 700; } td.warn { color: var(--warn); font-weight: 700; } td.pass { color: var(--pass); }
td.none { color: var(--soft); }
figure { margin: 0; } figure img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .85rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); } li { margin: .35rem 0; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .grid { stroke: var(--line); }
svg text.tick { fill: var(--soft); font-size: 12px; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin: 0 .35rem 0 1rem; }
"""
CURVES = {"sweep-alpha.svg": "Sweep over alpha, held-out images", "eps-curve.svg": "Worst case by eps"}


def html_page(reports: dict[str, dict[str, Any]], folder: Path, warnings: Sequence[str] = ()) -> str:
    """The run as one page. ``folder`` holds the curves, which become part of it."""
    from .render import headline, provenance, tables, verdict

    results = reports.get("evaluate", {}).get("results", {})
    mood = {"real gain": "good", "gradient masking": "bad", "worse": "bad"}.get(results.get("verdict", ""), "")
    parts = [
        f"<h1>{escape(headline(reports))}</h1>",
        '<p class="about">MeanSparse, base and sparsified model under the same attacks on the same images</p>',
        *(f'<p class="verdict bad"><b>Outdated:</b> {escape(sentence)}</p>' for sentence in warnings),
    ]
    if verdict(reports):
        parts.append(f'<p class="verdict {mood}"><b>Verdict:</b> {escape(verdict(reports))}</p>')
    if results:
        parts.append(accuracy_chart(results))
    for table in tables(reports):
        parts += [f"<h2>{escape(table.title)}</h2>", html_table(table)]
    if doubts_of(results):
        doubts = doubts_table(results)
        parts += [f"<h2>{escape(doubts.title)}</h2>", html_table(doubts), _sentences(results)]
    drawn = {"sweep-alpha.svg": "sweep-alpha" in reports, "eps-curve.svg": "eps_curve" in results}
    for name, title in CURVES.items():
        if drawn[name] and (folder / name).exists():  # one of an earlier evaluation may still lie there
            data = base64.b64encode((folder / name).read_bytes()).decode()
            image = f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">'
            parts += [f"<h2>{escape(title)}</h2>", f"<figure>{image}</figure>"]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in provenance(reports))
    parts += ["<h2>Provenance</h2>", f"<dl>{rows}</dl>"]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(headline(reports))}</title>\n<style>{STYLE}</style>\n<body>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def html_table(table: TextTable) -> str:
    """A table whose cells say by their class what warns."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = []
    for i, row in enumerate(table.rows):
        cells = "".join(f"<td{_class_of(cell)}>{escape(cell)}</td>" for cell in row)
        body.append(f"<tr{' class=strong' if i in table.strong else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def accuracy_chart(results: dict[str, Any]) -> str:
    """A dot and its standard error for each model in each comparison, on one axis from 0 to 100 %."""
    rows = results["comparisons"]
    left, right, step, top = 180, 700, 34, 14
    height = top + step * len(rows) + 26

    def place(fraction: float) -> float:
        return left + (right - left) * min(max(fraction, 0.0), 1.0)

    marks = []
    for tick in range(0, 101, 20):
        x = place(tick / 100)
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 22}"/>')
        marks.append(f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick} %</text>')
    for i, row in enumerate(rows):
        y = top + step * (i + 0.5)
        marks.append(f'<text x="0" y="{y + 4:.1f}">{escape(row["name"])}</text>')
        for model, shift in zip(MODELS, (-6, 6), strict=True):
            value, error = row[f"{model}_accuracy"], row[f"{model}_standard_error"]
            colour = f'stroke="var(--{model})"'
            marks.append(
                f'<line {colour} stroke-width="2" x1="{place(value - error):.1f}" x2="{place(value + error):.1f}" '
                f'y1="{y + shift:.1f}" y2="{y + shift:.1f}"/>'
                f'<circle cx="{place(value):.1f}" cy="{y + shift:.1f}" r="4.5" fill="var(--{model})"/>'
            )
    keys = "".join(f'<span class="key" style="background: var(--{model})"></span>{model}' for model in MODELS)
    return (
        f"<h2>Accuracy ± standard error {keys}</h2>"
        f'<svg viewBox="0 0 {right + 30} {height}" width="100%" role="img" aria-label="accuracy by attack">{"".join(marks)}</svg>'
    )


def _sentences(results: dict[str, Any]) -> str:
    lists = []
    for words, statuses in (("What warns", ("warn",)), ("What passed, or was not run", ("pass", "not run"))):
        found = doubt_sentences(results, *statuses)
        if found:
            items = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in found)
            opened = " open" if statuses == ("warn",) else ""
            lists.append(f"<details{opened}><summary>{words}</summary><ul>{items}</ul></details>")
    return "".join(lists)


def _class_of(cell: str) -> str:
    for word, name in (("WARN", "warn"), ("pass", "pass"), ("not run", "none")):
        if cell == word or cell.startswith(f"{word} "):
            return f' class="{name}"'
    return ""
