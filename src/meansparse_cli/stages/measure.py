"""``meansparse measure``: many alphas, sites and eps on one split, under plain and BPDA attacks. Nothing is chosen here.

    measure   model, statistics, a split   -> measurements/<name>/measure.yaml, outcomes.npz

All columns (an alpha at each site of a rule) of one eps go through the attacks as one stream and share a pool of adversarial
images, as in ``sweep-alpha`` (``pairs``). Rows of the report: a base row, alpha = 0, for each eps, then a row for each rule
of sites and alpha. ``outcomes.npz``: ``index`` and ``label`` (n,); ``clean``, ``plain``, ``bpda`` and ``worst``
(rows, n) bool, still classified correctly. ``--attack none``: the clean images alone, one forward pass each.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import discard, sha256_of, write_bytes
from ..operator.checkpoint import load_checkpoint, sparsify
from ..reporting.console import console, is_wide, live, note
from ..reporting.sweep_tables import measurement_table
from ..runs.folder import located, verified, weights_id
from ..runs.images import check_logits, count_classes, examples, images_id, split_note
from ..runs.model import eps_of, load_base, pick_device
from ..runs.report import RunPaths
from ..runs.stage_report import finished, write_stage
from ..settings.stages import MeasureConfig
from ..settings.values import eps_grid, eps_value

if TYPE_CHECKING:
    from ..engine.pairs import Column, PairStore
    from ..selection.choice import SweepPoint
    from ..sites.find import Site

EVERY = {"single:*": "single:{i}", "first:*": "first:{n}"}
MEASURES = ("clean", "plain", "bpda", "worst")


def measure(config: MeasureConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Clean, plain, BPDA and worst-case outcomes of every column on the first ``n_examples`` of a split."""
    from ..attacks.precision import precision_on
    from ..attacks.result import Budget
    from ..engine.evaluation import attacks_id
    from ..engine.pair_attack import PairSettings
    from ..engine.pairs import PairStore
    from ..selection.sweep import families_of

    run, started = located(config), time.monotonic()
    place = run.place_of(config)
    verified(run, "calibrate")
    plain, bpda = ((), ()) if config.attack == NO_ATTACK else families_of(config.attack, "")
    eps = eps_of(run, config) if plain else "0"
    alphas = tuple(sorted({alpha for alpha in config.alphas if alpha}))
    indices, x, y = examples(run, config, config.split, config.n_examples)
    inputs = {
        "calibrate.yaml": sha256_of(run.paths.report("calibrate")),
        "images": images_id(run, config, config.split, len(y)),
        "attacks": attacks_id((*plain, *bpda)),
    }
    resolved = config.model_copy(update={"eps": eps, "norm": run.norm, "alphas": alphas, "n_examples": len(y)})
    if done := finished("measure", place, resolved, inputs, fresh):
        return done

    if line := split_note(config.split):
        note(line)
    device = pick_device(config.device)
    precision = precision_on(device, config.precision)
    checkpoint = replace(load_checkpoint(run.paths.statistics), centre=config.centre, spread=config.spread)
    base = load_base(run, config, device, checkpoint.rule)
    check_logits(base, run, config, x[:2].to(device))
    model = sparsify(base, checkpoint, alpha=0.0)
    rules = site_rules_of(config.sites, model.sites)
    columns = columns_of(rules, alphas, model.sites)
    state_folder = place.paths.state
    if fresh:
        discard(state_folder)
    n_classes = count_classes(base, x[:2].to(device))
    rows: list[dict[str, Any]] = []
    outcomes: dict[str, list[Any]] = {name: [] for name in (MEASURES if plain else ("clean",))}
    passes = {"forward_passes": 0, "backward_passes": 0}
    for one, value in [(one, eps_value(one)) for one in eps_grid(eps)] if plain else [(eps, 0.0)]:
        budget = Budget(run.norm, value)  # type: ignore[arg-type]
        settings = PairSettings(budget, config.seed, config.batch_size, n_classes, precision)
        store = PairStore(
            model, x.to(device), y.to(device), indices, settings, plain=plain, bpda=bpda, folder=state_folder,
            block_size=config.block_size,
            key={
                "statistics": sha256_of(run.paths.statistics), "weights": weights_id(run), "options": checkpoint.options_id(),
                "precision": precision, "images": f"{config.dataset or run.source.dataset} {config.split}",
            },
        )  # fmt: skip
        points = _score(store, columns, f"eps {one}")
        if not plain:
            points = {key: _clean_alone(point) for key, point in points.items()}
        for (rule, _), point in points.items():
            rows.append({"eps": one, "sites": rule, **point.to_report(points[BASE])})
            for name, found in outcomes.items():
                found.append(getattr(point, name).numpy())
        passes = {key: passes[key] + value for key, value in store.passes().items()}
        shown = {"rows": [row for row in rows if row["eps"] == one], "split": config.split, "attacks": list(plain)}
        budget_note = f", {run.norm} {one}" if plain else ""
        table = measurement_table(shown | {"n_examples": len(y)}, with_errors=is_wide())
        console.print(replace(table, title=f"{run.source.name}: {table.title}{budget_note}").to_rich())
    _save_outcomes(place.paths, indices, y, outcomes)
    results = {
        "n_examples": len(y), "split": config.split, "attacks": list(plain), "bpda_attacks": list(bpda),
        "model": run.source.name, "precision": precision, "rows": rows, **passes,
    }  # fmt: skip
    return write_stage(place, "measure", resolved, sources, inputs, [place.paths.outcomes], device, started, results)


BASE = ("all", 0.0)
NO_ATTACK = ("none",)


def site_rules_of(given: Sequence[str], sites: Sequence[Site]) -> list[str]:
    """The rules to score, ``single:*`` and ``first:*`` written out over ``sites``.

    Raises ConfigError for a malformed rule; SiteError, in ``columns_of``, for one that chooses nothing.
    """
    from ..errors import ConfigError
    from ..sites.rules import parse_rule

    rules: list[str] = []
    for rule in given:
        if rule in EVERY:
            rules += [EVERY[rule].format(i=site.index, n=n) for n, site in enumerate(sites, start=1)]
            continue
        try:
            rules.append(parse_rule(rule))
        except ValueError as error:
            raise ConfigError(f"--sites {rule}: {error}") from error
    return list(dict.fromkeys(rules))


def columns_of(rules: Sequence[str], alphas: Sequence[float], sites: Sequence[Site]) -> dict[tuple[str, float], Column]:
    """(rule, alpha) -> an alpha for each site, the base first."""
    from ..engine.pairs import column_of
    from ..sites.rules import select_sites

    columns = {BASE: column_of([0.0] * len(sites))}
    for rule in rules:
        used = {site.index for site in select_sites(list(sites), rule)}
        for alpha in alphas:
            columns[rule, alpha] = column_of([alpha if site.index in used else 0.0 for site in sites])
    return columns


def _score(
    store: PairStore, columns: dict[tuple[str, float], Column], what: str
) -> dict[tuple[str, float], SweepPoint]:
    from ..selection.sweep import point_of

    wanted = list(dict.fromkeys(columns.values()))
    with live("pairs") as view:
        store.classify(wanted)
        for b, block in enumerate(store.blocks):
            if n := store.count_missing(b, {"plain": wanted, "bpda": wanted}):
                view.begin(f"{what}, images {int(block[-1]) + 1} of {len(store.x)}, {len(wanted)} columns", n)
            store.score(b, {"plain": wanted, "bpda": wanted}, view.advance)
    return {key: point_of(store, c, key[1]) for key, c in columns.items()}


def _clean_alone(point: SweepPoint) -> SweepPoint:
    """Without the curves of attacks that were not run."""
    return replace(point, plain=point.clean[:0], bpda=point.clean[:0], worst=point.clean[:0])


def _save_outcomes(paths: RunPaths, indices: Any, y: Any, outcomes: dict[str, list[Any]]) -> None:
    import numpy as np

    buffer = io.BytesIO()
    arrays = {name: np.stack(rows) for name, rows in outcomes.items()}
    np.savez_compressed(buffer, index=indices.cpu().numpy(), label=y.cpu().numpy(), **arrays)  # type: ignore[arg-type]
    write_bytes(paths.outcomes, buffer.getvalue())
