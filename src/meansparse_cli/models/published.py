"""What RobustBench has published about each model of its zoo, from ``published.json``: no network, no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..stats.format import percent
from .names import ModelSource, ZooEntry, package_data

N_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
"""How many images of the original test set (ImageNet: validation set) RobustBench evaluates on."""


@dataclass(frozen=True)
class PublishedModel(ZooEntry):
    """One leaderboard card, accuracies as fractions; None where it has no such figure.

    ``external_accuracy`` is under a stronger attack than AutoAttack, found by somebody else.
    """

    architecture: str
    parameters: int | None = None
    eps: str | None = None
    clean_accuracy: float | None = None
    autoattack_accuracy: float | None = None
    external_accuracy: float | None = None
    corruptions_accuracy: float | None = None
    unreliable: bool = False
    """RobustBench's flag: AutoAttack's figure is likely too high for this defence."""


def published_models() -> list[PublishedModel]:
    """The embedded models, then every entry of the zoo in RobustBench's order."""
    return [PublishedModel(**row) for row in package_data("published.json")["models"]]


def published_date() -> str:
    """The month the figures are of, as ``2025-03``."""
    return str(package_data("published.json")["date"])


def to_json(models: Sequence[PublishedModel]) -> str:
    """What ``models --json`` prints: date and origin once, then a row a model without its empty fields."""
    rows = [{k: v for k, v in asdict(m).items() if v not in (None, False)} for m in models]
    return json.dumps(package_data("published.json") | {"models": rows}, ensure_ascii=False)


def published_card(source: ModelSource) -> PublishedModel | None:
    """The row of a model, if it has one."""
    key = (source.name, source.dataset, source.threat)
    return next((m for m in published_models() if (m.name, m.dataset, m.threat) == key), None)


def published_results(source: ModelSource) -> dict[str, Any]:
    """The figures for ``evaluate.yaml`` under ``published``, with date and number of images; {} if there are none."""
    model = published_card(source)
    accuracies = {k: v for k, v in asdict(model).items() if k.endswith("_accuracy") and v is not None} if model else {}
    if model is None or not accuracies:
        return {}
    rest = {"n_examples": N_IMAGES[model.dataset], "date": published_date(), "unreliable": model.unreliable}
    # the cards of the authors' own entries are of the sparsified model, with its operators at work
    of = "sparsified" if model.architecture.startswith("MeanSparse ") else "base"
    return {"published": {"of": of} | accuracies | rest}


def published_note(results: dict[str, Any]) -> str | None:
    """One line about ``published_results``, to stand below figures of our own; None if there are none."""
    if not (published := results.get("published")):
        return None
    figures = [
        f"{name} {percent(accuracy)} %"
        for name in ("clean", "AutoAttack", "external", "corruptions")
        if (accuracy := published.get(f"{name.lower()}_accuracy")) is not None
    ]
    return (
        f"published for the {published['of']} model (RobustBench, {published['date']}): {', '.join(figures)}, "
        f"on the original {published['n_examples']:,} images, so not like for like"
    )
