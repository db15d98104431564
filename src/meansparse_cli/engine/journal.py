"""Decisions of a run that may be killed and typed again, on disk as they are made.

A sweep decides on outcomes so far: which alphas to score in full, which to refine, which step of a search to take. What is
scored afterwards adds images to the pools, and so changes the outcomes it decided on. A resumed run therefore repeats its
decisions from here instead of making them again.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..files import write_bytes


class Journal:
    """The decisions of one kind, in ``folder``; ``key`` names all that they depend on besides the outcomes."""

    def __init__(self, folder: Path, kind: str, key: object) -> None:
        self.file = folder / f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
        self.entries: dict[str, Any] = {}
        if self.file.exists():
            try:
                self.entries = dict(json.loads(self.file.read_text()))
            except (ValueError, TypeError) as error:
                hint = f"delete it and run again: {self.file}"
                raise ArtifactError(f"{self.file} cannot be read: {error}", hint=hint) from error

    def once(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided under ``name``, or what ``decide`` returns now, which is kept. Plain JSON values."""
        if name not in self.entries:
            self.entries[name] = decide()
            write_bytes(self.file, json.dumps(self.entries).encode())
        return self.entries[name]
