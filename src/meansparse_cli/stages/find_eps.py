"""``evaluate --find-eps``: how far what withstood everything is from what does not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.distances import MOST, PARTS, Distances, Levels, distances_npz, distances_to_report
from ..engine.evaluate import EvaluationRun
from ..files import write_bytes
from ..reporting.console import live, note
from ..reporting.curves import draw_distances
from ..runs.context import RunContext
from ..settings.stages import EvaluateConfig


def find_eps(
    context: RunContext[EvaluateConfig],
    runs: Mapping[str, EvaluationRun],
    at: str,
    state_folder: Path,
    fingerprint: dict[str, str],
) -> tuple[dict[str, Any], list[Path]]:
    """What goes into the report, and ``distances.npz``; what falls inside the budget ``at`` counts in all ``runs``."""
    run = runs[at]
    problem, examples, found, pool = run.cells.problem, run.cells.examples, Levels(), {}
    key = {**fingerprint, "alpha": run.plan.alpha, "precision": problem.precision}
    search = Distances(problem, examples, run.plan.attacks, state_folder / "find-eps" / "levels", key)
    with live("examples") as view:
        for name in run.models:
            rows = run.robust(name).nonzero().flatten()
            view.begin(f"smallest eps on {name}", len(rows))
            levels, inside = search.of(name, run.plan.alpha if name == "sparsified" else 0.0, rows, view.advance)
            found[name] = rows, levels
            if len(inside):
                pool[f"find-eps on {name}"] = inside
    if pool:
        n = sum(map(len, pool.values()))
        note(f"find-eps: {n:,} images found on the way break an example inside the budget: they count, as transfer")
        for one in runs.values():
            one.try_pool(pool)
        for name, (rows, levels) in found.items():
            is_robust = run.robust(name)[rows]
            found[name] = rows[is_robust], levels[is_robust]
    place, eps = context.place.paths.folder, problem.budget.eps
    results = {"distances": distances_to_report(found, eps, search.most)}
    file, png, svg = (place / f"distances.{ending}" for ending in ("npz", "png", "svg"))
    write_bytes(file, distances_npz(found, examples, eps))
    withstood = {f"{name}": (levels * (eps / PARTS)).tolist() for name, (_, levels) in found.items()}
    last = max((value for values in withstood.values() for value in values), default=eps)
    budgets = [eps * level / PARTS for level in range(PARTS, PARTS * MOST + 1) if eps * level <= PARTS * last]
    draw_distances(withstood, len(examples), budgets, norm=problem.budget.norm, png=png, svg=svg)
    note(f"distances: {png}")
    return results, [file]
