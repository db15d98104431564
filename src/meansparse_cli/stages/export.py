"""``meansparse export``: the sparsified model of a run as one file."""

import json
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, ConfigError
from ..files import save_torch, sha256_of, write_bytes
from ..models.export import robustbench_state, save_exported
from ..models.published import N_IMAGES
from ..models.source import kind_of
from ..operator.checkpoint import Checkpoint, sparsify
from ..operator.module import check_alpha
from ..reporting.card import model_card
from ..reporting.console import note
from ..reporting.hub_card import hub_card
from ..runs.context import RunContext
from ..runs.folder import file_name
from ..runs.operators import checkpoint_in_use, checkpoint_to_evaluate
from ..settings.stages import OPERATOR_OPTIONS, EvaluateConfig, StageConfig
from ..sites.rules import among_published

SUFFIXES = {"meansparse": ".safetensors", "robustbench": ".pt", "card": ".json", "hub-card": ""}


def export(file: Path | None, *, config: StageConfig, format: str, alpha: float | None) -> Path:
    """A run's sparsified model as one file, of a ``format`` of ``models/export.py``, or a card; returns its path.

    ``alpha`` overrides the one in use; a card needs the evaluation to be of this very alpha.
    """
    if format not in SUFFIXES:
        raise ConfigError(f"format is {format!r}", hint=f"one of {', '.join(SUFFIXES)}")
    context = RunContext("export", config)
    source, folder = context.run.source, context.run.paths.folder
    if alpha is not None:
        check_alpha(alpha)
    checkpoint = checkpoint_in_use(context, alpha)
    name = file_name(f"{source.name}-meansparse{SUFFIXES[format]}")
    path = file or folder / ("README.md" if format == "hub-card" else name)
    if format == "hub-card":
        _evaluation_of(context, checkpoint)
        write_bytes(path, hub_card(folder, source, context.run.norm, f"{name}.safetensors").encode())
        return path
    if format == "card":
        return _save_card(context, path, checkpoint)
    base = context.base(checkpoint.rule, device="cpu")
    if format == "robustbench":
        save_torch(path, robustbench_state(source, sparsify(base, checkpoint)))
    else:
        network = {
            "published_sites": among_published(checkpoint.rule) is not None,
            "settings": kind_of(source).network_settings(context.weights),
        }
        save_exported(path, source, base, checkpoint, network)
    value, size = float(checkpoint.alpha or 0), path.stat().st_size
    note(f"export: {source.name}, {len(checkpoint.active)} sites, alpha {value:g}, {size:,} bytes")
    return path


def _save_card(context: RunContext, path: Path, checkpoint: Checkpoint) -> Path:
    run, evaluation = context.run, _evaluation_of(context, checkpoint)
    norm = run.norm if evaluation is None else evaluation["config"]["settings"]["norm"]
    card = model_card(run.source, norm, checkpoint, evaluation)
    write_bytes(path, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    total, n = N_IMAGES.get(run.source.dataset), evaluation["results"]["n_examples"] if evaluation else 0
    if total and n < total:
        note(
            f"export: a leaderboard asks for all {total:,} test images, these figures are of {n:,}: "
            f"{run.command('evaluate')} --n-examples {total}"
        )
    note("export: link, name, authors and venue are yours to fill in")
    return path


def _evaluation_of(context: RunContext, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The report of evaluate, if there is one; refused where it is of other statistics or of other operators."""
    run = context.run
    command = run.command("evaluate")
    if not context.has("evaluate"):
        note(f"export: not evaluated, so the card has no figures: {command}")
        return None
    report = context.report("evaluate")
    upstream = next(name for name in ("sweep-alpha", "calibrate") if f"{name}.yaml" in report["inputs"])
    if report["inputs"][f"{upstream}.yaml"] != sha256_of(run.paths.report(upstream)):
        raise ArtifactError(
            f"evaluate.yaml was made from another {upstream}.yaml than the one in {run.paths.folder}",
            hint=f"evaluate anew: {command} --fresh",
        )
    settings, evaluated_at = report["config"]["settings"], report["results"]["alpha"]
    if (split := settings.get("split", "test")) != "test":
        raise ArtifactError(
            f"evaluate.yaml is of {split} images, and a card is about test images",
            hint=f"evaluate on those: {command} --split test --fresh",
        )
    if settings.get("defence") or settings.get("base"):
        hint = f"evaluate MeanSparse: {command} --fresh"
        raise ArtifactError("evaluate.yaml is of another defence than MeanSparse", hint=hint)
    if evaluated_at != checkpoint.alpha:
        raise ArtifactError(
            f"evaluate.yaml is of alpha {evaluated_at:g}, this is a card for alpha {checkpoint.alpha:g}",
            hint=f"evaluate this one, or export that one: --alpha {evaluated_at:g}",
        )
    names = ("alpha", *OPERATOR_OPTIONS)
    evaluated = EvaluateConfig(**{k: v for k, v in settings.items() if k in names})
    if checkpoint_to_evaluate(context, evaluated, upstream).options_id() != checkpoint.options_id():
        raise ArtifactError(
            "evaluate.yaml is of operators at other sites, or with another centre, spread or shape, than this card",
            hint=f"choose them with sweep-alpha, then evaluate without --alpha: {command} --fresh",
        )
    return report
