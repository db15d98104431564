"""``meansparse export``: the sparsified model of a run as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ArtifactError, ConfigError
from ..files import sha256_of
from ..operator.checkpoint import Checkpoint, sparsify
from ..reporting.card import model_card, n_test_images, save_card
from ..reporting.console import note
from ..runs.folder import Run, file_name, located, weights_of
from ..runs.model import checkpoint_in_use, checkpoint_to_evaluate, load_base
from ..runs.report import read_report
from ..settings.stages import EvaluateConfig, ModelConfig


def export(folder: Path, file: Path | None, *, format: str, alpha: float | None, allow_pickle: bool) -> Path:
    """A run's sparsified model as one file, of a ``format`` of ``models/export.py``, or a card; returns its path.

    ``alpha`` overrides the one in use, at all calibrated sites as in ``evaluate --alpha``. A card needs the evaluation to
    be of this very alpha.
    """
    from ..models import export as formats
    from ..models.source import kind_of
    from ..operator.sparsify import check_alpha
    from ..sites.rules import among_published

    suffixes = {"meansparse": ".safetensors", "robustbench": ".pt", "card": ".json"}
    if format not in suffixes:
        raise ConfigError(f"format is {format!r}", hint=f"one of {', '.join(suffixes)}")
    config = ModelConfig(run=folder, allow_pickle=allow_pickle)
    run = located(config)
    if alpha is not None:
        check_alpha(alpha)
    checkpoint = checkpoint_in_use(run, alpha)
    value = float(checkpoint.alpha or 0)
    path = file or folder / file_name(f"{run.source.name}-meansparse{suffixes[format]}")
    if format == "card":
        evaluation = _evaluation_of(run, checkpoint)
        norm = run.norm if evaluation is None else evaluation["config"]["settings"]["norm"]
        save_card(path, model_card(run.source, norm, checkpoint, evaluation))
        total, n = n_test_images(run.source), evaluation["results"]["n_examples"] if evaluation else 0
        if total and n < total:
            note(
                f"export: a leaderboard asks for all {total:,} test images, these figures are of {n:,}: {run.command('evaluate')} --n-examples {total}"
            )
        note("export: link, name, authors and venue are yours to fill in")
        return path
    base = load_base(run, config, "cpu", checkpoint.rule)
    if format == "robustbench":
        formats.save_robustbench(path, run.source, sparsify(base, checkpoint))
    else:
        network = {
            "published_sites": among_published(checkpoint.rule) is not None,
            "settings": kind_of(run.source).network_settings(weights_of(run)),
        }
        formats.save_exported(path, run.source, base, checkpoint, network)
    note(f"export: {run.source.name}, {len(checkpoint.active)} sites, alpha {value:g}, {path.stat().st_size:,} bytes")
    return path


def _evaluation_of(run: Run, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The report of evaluate, if there is one; refused where it is of other statistics or of other operators."""
    path = run.paths.report("evaluate")
    if not path.exists():
        note(f"export: not evaluated, so the card has no figures: {run.command('evaluate')}")
        return None
    report = read_report(path, "evaluate", mend=run.command("evaluate"))
    upstream = next(name for name in ("sweep-alpha", "calibrate") if f"{name}.yaml" in report["inputs"])
    if report["inputs"][f"{upstream}.yaml"] != sha256_of(run.paths.report(upstream)):
        raise ArtifactError(
            f"evaluate.yaml was made from another {upstream}.yaml than the one in {run.paths.folder}",
            hint=f"evaluate anew: {run.command('evaluate')} --fresh",
        )
    settings = report["config"]["settings"]
    if (split := settings.get("split", "test")) != "test":
        raise ArtifactError(
            f"evaluate.yaml is of {split} images, and a card is about test images",
            hint=f"evaluate on those: {run.command('evaluate')} --split test --fresh",
        )
    if report["results"]["alpha"] != checkpoint.alpha:
        raise ArtifactError(
            f"evaluate.yaml is of alpha {report['results']['alpha']:g}, this is a card for alpha {checkpoint.alpha:g}",
            hint=f"evaluate this one, or export that one: --alpha {report['results']['alpha']:g}",
        )
    names = ("alpha", "sites", "centre", "spread")
    evaluated = EvaluateConfig(**{k: v for k, v in settings.items() if k in names})
    if checkpoint_to_evaluate(run, evaluated, upstream).options_id() != checkpoint.options_id():
        raise ArtifactError(
            "evaluate.yaml is of operators at other sites, or with another centre or spread, than this card",
            hint=f"choose them with sweep-alpha, then evaluate without --alpha: {run.command('evaluate')} --fresh",
        )
    return report
