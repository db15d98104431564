"""Tables of a report, as plain text in rows and columns: what the terminal, Markdown and HTML all show.

Every function takes the ``results`` of a report, as they are in the YAML file.
"""

from dataclasses import dataclass
from typing import Any

from ..engine.evaluation import MODELS, TRANSFER, WORST_CASE


@dataclass(frozen=True)
class TextTable:
    """``rows`` under ``header``; the first column is a name, the others are numbers. ``strong``: rows that stand out."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    strong: frozenset[int] = frozenset()


def comparisons_table(results: dict[str, Any], *, interval: bool = True) -> TextTable:
    """Clean, each attack or group whose number is known, worst case last: both models and the paired difference."""
    header = ["", "base %", "sparsified %", "gain, points", "95 % interval", "won/lost"]
    rows = []
    for row in results["comparisons"]:
        low, high = row["sparsified_minus_base_interval_95"]
        rows.append([
            row["name"],
            *(accuracy(row[f"{model}_accuracy"], row[f"{model}_standard_error"]) for model in MODELS),
            points(row["sparsified_minus_base"], row["sparsified_minus_base_standard_error"]),
            f"{100 * low:+.1f} to {100 * high:+.1f}", f"{row['gained']}/{row['lost']}",
        ])  # fmt: skip
    keep = [i for i in range(len(header)) if interval or header[i] != "95 % interval"]
    strong = frozenset(i for i, row in enumerate(rows) if row[0] == WORST_CASE)
    table = [tuple(row[i] for i in keep) for row in rows]
    return TextTable("Accuracy, ± standard error; gains are paired", tuple(header[i] for i in keep), table, strong)


def attacks_table(results: dict[str, Any]) -> TextTable:
    """Each attack in the order it ran: how many it was given, how many of these it broke, what was left after it."""
    steps = {model: {step["attack"]: step for step in results["attacks"][model]} for model in MODELS}
    rows = []
    for attack in [*(name for name in steps["base"] if name != TRANSFER), TRANSFER]:
        row = [attack]
        for model in MODELS:
            step = steps[model][attack]
            row += [f"{step['n_broken']}/{step['n_faced']}", f"{100 * step['robust_accuracy_so_far']:.2f}"]
        rows.append(tuple(row))
    header = ("attack", "base broken", "left %", "sparsified broken", "left %")
    return TextTable("Attacks, in the order they ran: broken of those faced, right after all so far", header, rows)


def doubts_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The doubts of an evaluation; none where it was made without, or before there were any but counts."""
    doubts = results.get("doubts")
    return doubts if isinstance(doubts, list) else []


def doubts_table(results: dict[str, Any]) -> TextTable:
    """A row a doubt: its status and value on each model, and the limit."""
    doubts = doubts_of(results)
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for name in dict.fromkeys(doubt["name"] for doubt in doubts):
        of = {doubt["model"]: doubt for doubt in doubts if doubt["name"] == name}
        if any(doubt["status"] == "warn" for doubt in of.values()):
            strong.add(len(rows))
        one = next(iter(of.values()))
        sign = "≥" if one["at_least"] else "≤"
        cells = [_status(of[model]) if model in of else "" for model in MODELS]
        rows.append((name, *cells, f"{sign} {_value(one['limit'], one['unit'])}"))
    n = sum(doubt["status"] == "warn" for doubt in doubts)
    return TextTable(
        f"Doubts: {n or 'no'} warning{'s' * (n != 1)}", ("", "base", "sparsified", "limit"), rows, frozenset(strong)
    )


def doubt_sentences(results: dict[str, Any], *statuses: str) -> list[tuple[str, str]]:
    """(doubt on model, what was found and who asks for it) of each doubt with one of ``statuses``; none means all."""
    return [
        (f"{doubt['name']} ({doubt['model']})", f"{doubt['sentence']} [{doubt['source']}]")
        for doubt in doubts_of(results)
        if not statuses or doubt["status"] in statuses
    ]


def eps_curve_table(results: dict[str, Any]) -> TextTable:
    """The worst case at each eps, where there were several."""
    rows = [
        (
            row["eps"],
            *(accuracy(row[f"{model}_accuracy"], row[f"{model}_standard_error"]) for model in MODELS),
            points(row["sparsified_minus_base"], row["sparsified_minus_base_standard_error"]),
            row["verdict"],
        )
        for row in results.get("eps_curve", [])
    ]
    return TextTable("Worst case by eps", ("eps", "base %", "sparsified %", "gain, points", "verdict"), rows)


def sweep_table(results: dict[str, Any]) -> TextTable:
    """The alphas of a sweep on the held-out split; the chosen one stands out."""
    kinds = [kind for kind in ("clean", "plain", "bpda", "worst") if "accuracy" in results["curve"][0].get(kind, {})]
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for row in sorted(results["curve"], key=lambda row: row["alpha"]):
        if row["alpha"] == results["alpha"]:
            strong.add(len(rows))
        cells = []
        for kind in kinds:
            found = row[kind]
            n = found.get("n_examples", 0)
            note = "" if n == results["n_examples"] else f" of {n}"  # an alpha that racing dropped
            cells.append(accuracy(found["accuracy"], found["standard_error"]) + note if "accuracy" in found else "")
        rows.append((f"{row['alpha']:g}", *cells))
    names = {"clean": "clean %", "plain": "plain attacks %", "bpda": "BPDA %", "worst": "worst case %"}
    title = f"Sweep over alpha on {results['n_examples']:,} held-out images; chosen: {results['alpha']:g}"
    return TextTable(title, ("alpha", *(names[kind] for kind in kinds)), rows, frozenset(strong))


def measurement_table(results: dict[str, Any]) -> TextTable:
    """A row an alpha, or a site rule, of a measurement; the columns that say nothing are left out."""
    base_first = sorted(results["rows"], key=lambda row: row["alpha"] != 0)
    rows = [row for eps in dict.fromkeys(row["eps"] for row in base_first) for row in base_first if row["eps"] == eps]
    names = {"eps": [row["eps"] for row in rows], "sites": [row["sites"] if row["alpha"] else "" for row in rows]}
    shown = {name: cells for name, cells in names.items() if len(set(cells) - {""}) > 1}
    accuracies, gains = (
        (("clean", "plain", "worst"), ("plain", "worst")) if results["attacks"] else (("clean",), ("clean",))
    )
    cells = {
        **shown,
        "alpha": [f"{row['alpha']:g}" for row in rows],
        **{f"{name} %": [f"{100 * row[name]['accuracy']:.2f}" for row in rows] for name in accuracies},
        **{f"{name} - base": [_minus_base(row, name) for row in rows] for name in gains},
    }
    attacked = f"plain = {', '.join(results['attacks'])}" if results["attacks"] else "none of them attacked"
    title = f"Measurement on {results['n_examples']:,} {results['split']} images, {attacked}"
    return TextTable(title, tuple(cells), list(zip(*cells.values(), strict=True)))


def _minus_base(row: dict[str, Any], curve: str) -> str:
    return points(row[curve]["minus_base"], row[curve]["minus_base_standard_error"]) if row["alpha"] else ""


def accuracy(fraction: float, standard_error: float) -> str:
    """``67.33 ± 2.71``, in percent."""
    return f"{100 * fraction:.2f} ± {100 * standard_error:.2f}"


def points(difference: float, standard_error: float) -> str:
    """``-3.33 ± 1.32``, in percentage points."""
    return f"{100 * difference:+.2f} ± {100 * standard_error:.2f}"


def _status(doubt: dict[str, Any]) -> str:
    word = {"pass": "pass", "warn": "WARN", "not run": "not run"}[doubt["status"]]
    return word if doubt["value"] is None else f"{word} {_value(doubt['value'], doubt['unit'])}"


def _value(value: float, unit: str) -> str:
    if unit in ("share", "points"):
        text = f"{100 * value:.1f}"
        return f"{text.removesuffix('.0')} {'%' if unit == 'share' else 'pts'}"
    if unit == "count":
        return f"{value:g}"
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.01 else f"{value:.0e}"
