"""The tables of an evaluation: while it runs, and from the ``results`` of its report."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..attacks import find_attack
from ..engine.distances import QUANTILES
from ..engine.outcomes import CLEAN, MODELS, TRANSFER, WORST_CASE, ModelName, is_bpda, run_order
from ..stats.format import in_points, interval, percent
from .console import LiveView
from .table import Table

if TYPE_CHECKING:
    from ..engine.evaluate import EvaluationProgress, Plan

COLOURS = {
    "real gain": "bold green",
    "no difference": "bold",
    "inconclusive": "yellow",
    "gradient masking": "bold red",
    "worse": "bold red",
}
COUNTS = {
    "images": "n_images",
    "examples they speak of": "n_evaluated",
    "equal to the clean image": "n_unchanged",
    "with NaN or infinity": "n_not_finite",
    "outside [0, 1]": "n_outside_range",
    "outside the budget": "n_outside_budget",
}
FORBIDDEN = ("with NaN or infinity", "outside [0, 1]", "outside the budget")


def comparisons_table(results: dict[str, Any], *, with_interval: bool = True) -> Table:
    """Clean, each attack or group whose number is known, worst case last: both models and the paired difference."""
    rows = results["comparisons"]
    columns = {
        "": [row["name"] for row in rows],
        **_accuracies_and_gain(rows),
        "95 % interval": [interval(*row["sparsified_minus_base_interval_95"], digits=1) for row in rows],
        "won/lost": [f"{row['gained']}/{row['lost']}" for row in rows],
    }
    if not with_interval:
        del columns["95 % interval"]
    strong = frozenset(i for i, row in enumerate(rows) if row["name"] == WORST_CASE)
    return Table.of("Accuracy, ± standard error; gains are paired", columns, strong=strong)


def attacks_table(results: dict[str, Any]) -> Table:
    """Each attack in the order it ran: how many it was given, how many of these it broke, what was left after it."""
    steps = {model: {step["attack"]: step for step in results["attacks"][model]} for model in MODELS}
    rows = []
    for attack in [*(name for name in steps["base"] if name != TRANSFER), TRANSFER]:
        row = [attack]
        for model in MODELS:
            step = steps[model][attack]
            row += [f"{step['n_broken']}/{step['n_faced']}", percent(step["robust_accuracy_so_far"])]
        rows.append(tuple(row))
    header = ("attack", "base broken", "left %", "sparsified broken", "left %")
    return Table("Attacks, in the order they ran: broken of those faced, right after all so far", header, rows)


def eps_table(results: dict[str, Any], *, with_clean: bool = False) -> Table:
    """The worst case at each eps, where there were several; ``with_clean``: the clean images too, as eps 0."""
    clean = [row for row in results["comparisons"] if with_clean and row["name"] == CLEAN]
    rows = [*clean, *results.get("eps_curve", ())]
    eps, verdicts = (
        [row.get(key, default) for row in rows] for key, default in (("eps", "0 (clean)"), ("verdict", ""))
    )
    return Table.of("Worst case by eps", {"eps": eps, **_accuracies_and_gain(rows), "verdict": verdicts})


def diagnostics_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The diagnostics of an evaluation; none where it was made without, or before there were any but counts."""
    found = results.get("doubts")
    return found if isinstance(found, list) else []


def masked_by_site(results: dict[str, Any]) -> dict[str, float]:
    """Site, first to last -> the share of its features that operators replace; empty where that was not looked at."""
    found = [row["details"]["sites"] for row in diagnostics_of(results) if "sites" in (row.get("details") or {})]
    return found[-1] if found else {}


def diagnostics_table(results: dict[str, Any]) -> Table:
    """A row a check: its status and value on each model, and the limit."""
    found = diagnostics_of(results)
    of = {(row["name"], row["model"]): row for row in found}
    checks = {row["name"]: row for row in reversed(found)}
    names = list(dict.fromkeys(row["name"] for row in found))
    columns: dict[str, list[str]] = {"": names}
    columns |= {model: [_status(of.get((name, model))) for name in names] for model in MODELS}
    columns["limit"] = [
        f"{'≥' if checks[name]['at_least'] else '≤'} {_value(checks[name]['limit'], checks[name]['unit'])}"
        for name in names
    ]
    warned = [row["name"] for row in found if row["status"] == "warn"]
    title = f"Doubts: {len(warned) or 'no'} warning{'s' * (len(warned) != 1)}"
    return Table.of(title, columns, strong=frozenset(i for i, name in enumerate(names) if name in warned))


def diagnostic_sentences(results: dict[str, Any], *statuses: str) -> list[tuple[str, str]]:
    """(check on model, what was found and who asks for it) of each check with one of ``statuses``."""
    return [
        (f"{row['name']} ({row['model']})", f"{row['sentence']} [{row['source']}]")
        for row in diagnostics_of(results)
        if row["status"] in statuses
    ]


def judgements_table(sets: Sequence[dict[str, Any]], norm: str, title: str) -> Table:
    """Of ``verify``: a column for each set of images; what no attacker may use stands out."""
    rows = {words: [f"{one[key]:,}" for one in sets] for words, key in COUNTS.items()}
    forbidden = [any(one[key] for one in sets) and words in FORBIDDEN for words, key in COUNTS.items()]
    rows[f"largest {norm} distance"] = [f"{one['largest_distance']:.6g}" for one in sets]
    for model in (model for model in MODELS if model in sets[0]):
        found = [one[model] for one in sets]
        rows[f"misclassified by {model}"] = [f"{one['n_misclassified']:,}" for one in found]
        rows[f"clean accuracy of {model}, %"] = [percent(one["clean_accuracy"]) for one in found]
        robust = [percent(one["robust_accuracy"], one["robust_standard_error"]) for one in found]
        rows[f"robust accuracy of {model}, %"] = robust
    strong = frozenset(i for i, is_forbidden in enumerate(forbidden) if is_forbidden)
    names = [one["name"] if one["name"] == "images" else f"found on {one['name']}" for one in sets]
    return Table(title, ("", *names), [(words, *cells) for words, cells in rows.items()], strong)


def show_evaluation(results: dict[str, Any], title: str, *, with_interval: bool) -> Group:
    """For the terminal: accuracies and paired gains, then the verdict."""
    table = comparisons_table(results, with_interval=with_interval)
    verdict = results["verdict"]
    return Group(
        Text(title, style="bold"),
        Text(f"{table.title}; won/lost: examples", style="italic"),
        table.body(),
        Text.assemble("verdict: ", (verdict, COLOURS.get(verdict, "bold")), f". {results['reason']}"),
    )


def evaluation_notes(results: dict[str, Any], n_classes: int, swept: float | None) -> list[str]:
    """What a reader has to know of the numbers; ``swept``: the alpha that a sweep chose, if there was one."""
    rows, alpha = {row["name"]: row for row in results["comparisons"]}, results["alpha"]
    clean, chance = rows[CLEAN], 1 / n_classes
    said = []
    if results["n_examples"] >= 30 and clean["base_accuracy"] - 2 * clean["base_standard_error"] <= chance:
        said.append(
            f"the base model is right on {percent(clean['base_accuracy'])} % of the clean images, where guessing is on "
            f"{percent(chance)} %: were its weights given (--weights), and are classes and pixels in its order?"
        )
    if not alpha:
        said.append("alpha is 0, so the sparsified model is the base model; to see another: --alpha 0.2")
    elif swept is not None and swept != alpha:
        said.append(f"at alpha {alpha:g}, as asked for; the sweep chose {swept:g}")
    if alpha and "bpda" not in rows and any(is_bpda(step["attack"]) for step in results["attacks"]["sparsified"]):
        said.append("BPDA counts in the worst case; for a number of its own, and of each attack: --individual")
    return said


def distances_table(results: dict[str, Any]) -> Table:
    """How far what withstood everything is from what does not: the smallest eps that breaks it."""
    found = results["distances"]
    models, levels = [name for name in MODELS if name in found], 255 * found["budget"]
    is_over_255 = abs(levels - round(levels)) < 1e-6

    def written(eps: float) -> str:
        return f"{255 * eps:.4g}/255" if is_over_255 else f"{eps:.4g}"

    columns = {"": ["examples robust at it", *(f"{q} % of them break by" for q in QUANTILES), "none broke"]}
    for name in models:
        of_model = found[name]
        values = [of_model["quantiles"].get(f"{q}") for q in QUANTILES]
        known = [f"> {written(found['largest'])}" if value is None else written(value) for value in values]
        known = known if of_model["n_robust"] else [""] * len(QUANTILES)
        columns[name] = [f"{of_model['n_robust']:,}", *known, f"{of_model['n_beyond']:,}"]
    return Table.of(f"Smallest eps that breaks an example, in steps of {written(found['step'])}", columns)


def show_attacks(
    view: LiveView, plan: "Plan", *, place: tuple[int, int] = (1, 1), afterwards: float = 0.0
) -> "Callable[[EvaluationProgress], None]":
    """The function that keeps ``view`` up to date: a row an attack, how many examples are still right.

    ``place``: which of how many eps this is. ``afterwards``: passes an example that survives both models costs once
    all attacks are done, as ``AttackSpec.cost`` counts them.
    """
    current: tuple[str, str] | None = None
    order, models = run_order(plan.attacks), MODELS if plan.alpha else MODELS[:1]
    turns: list[tuple[str, ModelName]] = [(attack, model) for attack in (CLEAN, *order) for model in models]

    def cost(progress: "EvaluationProgress", turn: tuple[str, ModelName]) -> float:
        """Passes of a turn, at most: if nothing that is still right breaks."""
        counts = list(progress.n_robust.get(turn[1], {}).values())
        n = progress.n_examples if not counts else counts[0] if plan.individual else counts[-1]
        return progress.n_examples if turn[0] == CLEAN else n * find_attack(turn[0]).cost

    def work(progress: "EvaluationProgress") -> tuple[float, float]:
        """Passes of this turn and of all after it."""
        t = turns.index((progress.attack, progress.model))
        a_further_eps = sum(cost(progress, turn) for turn in turns)
        this = progress.n_total * (1 if progress.attack == CLEAN else find_attack(progress.attack).cost)
        after = sum(cost(progress, turn) for turn in turns[t + 1 :])
        return this, after + (place[1] - place[0]) * a_further_eps + afterwards

    def words(progress: "EvaluationProgress") -> str:
        name = f"{progress.attack} on {progress.model}"
        if progress.attack != CLEAN:
            name = f"attack {order.index(progress.attack) + 1} of {len(order)}, {name}"
        return name if place[1] == 1 else f"eps {place[0]} of {place[1]}, {name}"

    def on_update(progress: "EvaluationProgress") -> None:
        nonlocal current
        if (progress.model, progress.attack) != current:
            current = (progress.model, progress.attack)
            view.begin(words(progress), progress.n_total, progress.n_resumed, work=work(progress))
        view.advance(progress.n_done - view.done)
        attacks = list(dict.fromkeys(name for counts in progress.n_robust.values() for name in counts))
        columns = {"after": attacks}
        for model in MODELS:
            counts = [progress.n_robust.get(model, {}).get(attack) for attack in attacks]
            columns[f"{model}, still right"] = ["" if count is None else f"{count:,}" for count in counts]
        view.show(Table.of(f"of {progress.n_examples:,} examples", columns).to_rich())

    return on_update


def show_diagnostics(results: dict[str, Any]) -> Group:
    """For the terminal: every check with the number behind it, and in words what warns."""
    parts: list[RenderableType] = [diagnostics_table(results).to_rich(strong="bold red")]
    for name, sentence in diagnostic_sentences(results, "warn"):
        parts.append(Text.assemble((f"{name}: ", "bold"), sentence))
    return Group(*parts)


def _accuracies_and_gain(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    gain = [in_points(row["sparsified_minus_base"], row["sparsified_minus_base_standard_error"]) for row in rows]
    accuracies = {
        f"{model} %": [percent(row[f"{model}_accuracy"], row[f"{model}_standard_error"]) for row in rows]
        for model in MODELS
    }
    return accuracies | {"gain, points": gain}


def _status(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    word = "WARN" if row["status"] == "warn" else row["status"]
    return word if row["value"] is None else f"{word} {_value(row['value'], row['unit'])}"


def _value(value: float, unit: str) -> str:
    if unit in ("share", "points"):
        return f"{percent(value, digits=1).removesuffix('.0')} {'%' if unit == 'share' else 'pts'}"
    if unit == "count":
        return f"{value:g}"
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.01 else f"{value:.0e}"
