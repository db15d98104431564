"""A JSON with the fields of RobustBench's ``model_info`` for a sparsified model; null or empty if not measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.outcomes import WORST_CASE, is_bpda
from ..models.published import N_IMAGES, published_card
from ..stats.format import percent
from .template import fill

if TYPE_CHECKING:
    from ..models.names import ModelSource
    from ..operator.checkpoint import Checkpoint


def model_card(
    source: ModelSource, norm: str, checkpoint: Checkpoint, evaluation: dict[str, Any] | None
) -> dict[str, Any]:
    """The fields of a ``model_info`` JSON, in its order, for one sparsified model; percentages as text, as there.

    ``evaluation`` is an ``evaluate.yaml`` or None. What was not measured is empty, but for ``external`` (the worst
    case, BPDA included), whose presence RobustBench's generator takes for a number. ``unreliable`` is true where BPDA
    was not run: plain attacks over-report this defence. ``link``, ``name``, ``authors``, ``venue`` are the submitter's.
    """
    results = evaluation["results"] if evaluation is not None else {}
    rows = {row["name"]: row for row in results.get("comparisons", [])}
    has_bpda = WORST_CASE in rows and any(is_bpda(name) for name in rows[WORST_CASE]["attacks"])
    worst = _percent(rows.get(WORST_CASE))
    known = published_card(source)
    architecture = source.name if known is None else known.architecture.removeprefix("MeanSparse ")
    return {
        "link": "",
        "name": "",
        "authors": "",
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": source.dataset,
        "venue": "",
        "architecture": f"MeanSparse {architecture}",
        "eps": results.get("eps", ""),
        "clean_acc": _percent(rows.get("clean")),
        "reported": worst,
        "autoattack_acc": _percent(rows.get("autoattack")),
        **({"external": worst} if has_bpda else {}),
        "footnote": _footnote(source, norm, checkpoint, evaluation, has_bpda=has_bpda),
        "unreliable": None if evaluation is None else not has_bpda,
    }


def _footnote(
    source: ModelSource, norm: str, checkpoint: Checkpoint, evaluation: dict[str, Any] | None, *, has_bpda: bool
) -> str:
    results, settings = (evaluation["results"], evaluation["config"]["settings"]) if evaluation else ({}, {})
    text = fill(
        __package__,
        "footnote.txt",
        name=source.name,
        norm=norm,
        checkpoint=checkpoint,
        results=results,
        worst=next((row for row in results.get("comparisons", ()) if row["name"] == WORST_CASE), None),
        total=N_IMAGES.get(source.dataset),
        data=Path(settings["dataset"]).name if settings.get("dataset") not in (None, source.dataset) else "",
        has_bpda=has_bpda,
    )
    return " ".join(text.split())


def _percent(row: dict[str, Any] | None) -> str:
    return "" if row is None else percent(row["sparsified_accuracy"])
