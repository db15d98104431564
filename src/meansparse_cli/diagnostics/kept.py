"""Answers that outlive a kill: each kind of check of each model, kept as it ends."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..files import load_torch
from ..ledger import Ledger
from .subject import Diagnostic, Subject


class KeptAnswers:
    """In ``folder``, a place for each ``key``, which names all that the answers depend on."""

    def __init__(self, folder: Path, key: str, note: Callable[[str], None] | None = None) -> None:
        self.folder, self.key = folder, key
        # below a folder of its own: two folders below an evaluation's state, every file is taken for outcomes
        self.ledger = Ledger(folder / "answers", {"key": key}, on_change="beside", note=note)

    def once(self, kind: str, subject: Subject, check: Callable[[Subject], list[Diagnostic]]) -> list[Diagnostic]:
        """What was found before, with the images that broke an example; or what ``check`` finds now."""
        name = f"{subject.name}-{kind}"
        state = self.ledger.get(name) or self._from_before(name)
        if state is None:
            n_before = len(subject.broken_by)
            found = check(subject)
            pairs = [{"rows": rows, "images": images} for rows, images in subject.broken_by[n_before:]]
            self.ledger.put(name, {"doubts": [asdict(one) for one in found], "broken_by": pairs})
            return found
        subject.broken_by.extend((pair["rows"], pair["images"]) for pair in state["broken_by"])
        return [Diagnostic(**one) for one in state["doubts"]]

    def _from_before(self, name: str) -> dict[str, Any] | None:
        """What a version without a ledger left: answers in JSON, images beside them; None for anything else."""
        file = self.folder / f"{name}.json"
        try:
            answers = json.loads(file.read_text())
            none: dict[str, Any] = {"key": answers["key"], "broken_by": []}
            images = load_torch(file.with_suffix(".pt")) if answers["n_images"] else none
            is_ours = answers["key"] == images["key"] == self.key
            return {"doubts": answers["doubts"], "broken_by": images["broken_by"]} if is_ours else None
        except (OSError, ValueError, KeyError, TypeError, ArtifactError):
            return None
