"""``report --format csv``: what became of each example of an evaluation, a line each, from its ``outcomes.npz``."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.outcomes import MODELS
from ..errors import ConfigError
from ..runs.report import RunPaths, verify_outputs

ROBUST = "robust"


def examples_csv(report: dict[str, Any] | None, folder: Path, *, mend: str) -> str:
    """``broken_by`` an attack: 1, withstood: 0, not tried: empty. ``mend``: the command that evaluates.

    Raises ConfigError where nothing was evaluated, ArtifactError where the outcomes are not those of ``report``.
    """
    if report is None:
        raise ConfigError(f"{folder} holds no evaluation, so no outcomes", hint=f"run: {mend}")
    verify_outputs(report, folder, mend=mend)
    with np.load(RunPaths(folder).outcomes) as outcomes:
        names = outcomes["name"].tolist()
        header = ["index", "label"]
        header += [
            f"{model} {name}" for model in MODELS for name in ("first_broken_by", *(f"broken_by {n}" for n in names))
        ]
        columns = [outcomes["index"].tolist(), outcomes["label"].tolist()]
        for model in MODELS:
            first = outcomes[f"{model}_first_broken_by"].tolist()
            columns.append([ROBUST if at < 0 else names[at] for at in first])
            columns += [["" if code < 0 else code for code in of_name] for of_name in outcomes[f"{model}_outcome"].T]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *zip(*columns, strict=True)])
    return text.getvalue()
