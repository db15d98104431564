"""What ``evaluate`` adds where it is asked: how far what withstood everything is from what does not, what was found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.distances import MOST, PARTS, Distances, Levels, distances_npz, distances_to_report
from ..engine.evaluate import EvaluationRun
from ..engine.outcomes import each_model
from ..engine.witnesses import collect_adversarial, save_adversarial, save_external
from ..files import write_bytes
from ..reporting.console import live, note
from ..reporting.curves import draw_distances
from ..reporting.gallery import draw_gallery
from ..runs.context import RunContext
from ..settings.stages import EvaluateConfig
from ..settings.values import eps_value


def find_eps(
    context: RunContext[EvaluateConfig],
    runs: Mapping[str, EvaluationRun],
    at: str,
    state_folder: Path,
    fingerprint: dict[str, str],
) -> tuple[dict[str, Any], list[Path]]:
    """``--find-eps``: a part of the report, and ``distances.npz``; what falls inside budget ``at`` counts in all."""
    run = runs[at]
    problem, examples, found, pool = run.cells.problem, run.cells.examples, Levels(), {}
    key = {**fingerprint, "alpha": run.plan.alpha, "precision": problem.precision}
    search = Distances(problem, examples, run.plan.attacks, state_folder / "find-eps" / "levels", key)
    with live("examples") as view:
        for name, alpha in each_model(run.plan.alpha).items():
            rows = run.robust(name).nonzero().flatten()
            view.begin(f"smallest eps on {name}", len(rows))
            levels, inside = search.of(name, alpha, rows, view.advance)
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


def keep_witnesses(
    context: RunContext[EvaluateConfig], runs: Mapping[str, EvaluationRun], eps: str, operator: str
) -> list[Path]:
    """``--save-witnesses``: the images of the runs up to ``eps`` that broke an example, and a gallery; their files."""
    up_to_this = [run for one, run in runs.items() if eps_value(one) <= eps_value(eps)]
    folder, test = context.place.paths.folder, context.split(context.config.split)
    found_on, examples = collect_adversarial(up_to_this), up_to_this[-1].cells.examples
    files = [folder / "witnesses.safetensors"]
    save_adversarial(files[0], found_on, up_to_this[-1], operator)
    for name, found in found_on.items():
        file = folder / f"witnesses-{name}.pt"
        files += [file] if save_external(file, test, found, len(examples)) else []
    clean = dict(zip(examples.indices.tolist(), examples.x.cpu(), strict=True))
    png, svg = folder / "gallery.png", folder / "gallery.svg"
    title = f"{context.run.source.name}, {operator}, {context.run.norm} {eps}: the first examples that were broken"
    for before in (png, svg):
        before.unlink(missing_ok=True)
    if draw_gallery(found_on, clean, eps_value(eps), title=title, png=png, svg=svg):
        note(f"gallery: {png}")
    return files
