"""What an evaluation keeps on disk, so that it can be killed anywhere and go on with the same result.

    <state folder>/settings.json                         what every outcome here depends on
    <state folder>/<model>/<attack>/<first example>.pt   one chunk of examples under one attack, or ``clean``

Every file is written whole or not at all, after its chunk is done: a kill costs the chunk in flight. A chunk always
covers the same positions, so one that is done again holds the same examples; one that was cut short by a smaller
``n_examples`` is completed with the missing ones alone.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artifacts import load_torch, save_torch, write_bytes
from .attacks.result import AttackResult
from .errors import ArtifactError

FORMAT = 1  # raise it when what an attack does, or these files, change


@dataclass
class ChunkOutcome:
    """What one attack did to the examples of one chunk so far.

    ``attempted`` and ``broken`` (chunk_size,) bool; ``adversarial`` (number broken, channels, height, width) float32, the
    images of the broken examples in their order. Passes are counted in examples. ``rejected``: breaks that the attack
    claimed and its judge did not confirm.
    """

    attempted: Tensor
    broken: Tensor
    adversarial: Tensor | None = None
    forward_passes: int = 0
    backward_passes: int = 0
    seconds: float = 0.0
    rejected: int = 0

    def add(self, rows: Tensor, result: AttackResult) -> None:
        """Enter the result of an attack on ``rows`` (m,) of this chunk, none of them attempted before."""
        broken = result.broken.cpu()
        found = result.adversarial.detach().cpu().float()
        before = self.broken.nonzero().flatten()
        rows_broken = torch.cat([before, rows[broken]])
        images = found[broken] if self.adversarial is None else torch.cat([self.adversarial, found[broken]])
        self.adversarial = images[rows_broken.argsort()]
        self.attempted[rows], self.broken[rows] = True, broken
        self.forward_passes += result.forward_passes
        self.backward_passes += result.backward_passes
        self.seconds += result.seconds
        self.rejected += result.rejected


class EvaluationState:
    """The state folder of one evaluation.

    ``settings`` must be what they were when the folder was begun. ``attack_versions`` (attack -> what it does) must
    agree for the attacks both know; further attacks may join later. Raises ``ArtifactError`` with the differences.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], attack_versions: dict[str, str], chunk_size: int) -> None:
        self.folder = folder
        self.chunk_size = chunk_size
        now = {"format": FORMAT, "chunk_size": chunk_size, **settings}
        file = folder / "settings.json"
        before = self._read(file) if file.exists() else {**now, "attacks": {}}
        known: dict[str, str] = before["attacks"]
        changed = [
            f"  {key}: {before.get(key)} -> {now.get(key)}"
            for key in sorted(({*before} | {*now}) - {"attacks"})
            if before.get(key) != now.get(key)
        ]
        changed += [
            f"  attack {name}: {known[name]} -> {version}"
            for name, version in attack_versions.items()
            if known.get(name, version) != version
        ]
        if changed:
            raise ArtifactError(
                f"{folder} holds an evaluation with other settings (then -> now):\n" + "\n".join(changed),
                hint="add --fresh to throw it away and start anew, or --run DIR to keep both",
            )
        if not attack_versions.items() <= known.items() or not file.exists():
            content = now | {"attacks": known | attack_versions}
            write_bytes(file, json.dumps(content, indent=1, sort_keys=True).encode())

    def load(self, model: str, attack: str, start: int) -> ChunkOutcome:
        """The chunk that begins at position ``start``; blank if it was never begun."""
        file = self._file(model, attack, start)
        if not file.exists():
            nothing = torch.zeros(self.chunk_size, dtype=torch.bool)
            return ChunkOutcome(nothing, nothing.clone())
        try:
            outcome = ChunkOutcome(**load_torch(file))
            whole = len(outcome.attempted) == len(outcome.broken) == self.chunk_size
        except (TypeError, AttributeError):
            whole = False
        if not whole:
            raise ArtifactError(f"{file} is not a chunk of this evaluation", hint=f"delete it and run again: {file}")
        return outcome

    def save(self, model: str, attack: str, start: int, outcome: ChunkOutcome) -> None:
        """Replace the chunk on disk, atomically."""
        save_torch(self._file(model, attack, start), vars(outcome))

    def check_examples(self, start: int, indices: Tensor, x: Tensor, y: Tensor) -> None:
        """Refuse other examples than those this chunk began with: more may follow, none may change.

        ``indices`` (m,), ``x`` (m, channels, height, width), ``y`` (m,) of the positions from ``start``.
        """
        file = self.folder / "examples" / f"{start:07d}.pt"
        now = _example_ids(indices, x, y)
        before: Tensor = load_torch(file)["ids"] if file.exists() else now[:0]
        n = min(len(before), len(now))
        if not torch.equal(before[:n], now[:n]):
            raise ArtifactError(
                f"{self.folder} holds an evaluation of other examples: {int((before[:n] != now[:n]).sum())} of the {n} "
                f"from position {start} on are not the same",
                hint="another data set, order or preprocessing: add --fresh to start anew, or --run DIR to keep both",
            )
        if len(now) > len(before):
            save_torch(file, {"ids": now})

    def _file(self, model: str, attack: str, start: int) -> Path:
        return self.folder / model / attack / f"{start:07d}.pt"

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            content["attacks"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{file} cannot be read: {error}", hint="add --fresh to start the evaluation anew"
            ) from error
        return content


def _example_ids(indices: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(m,) int64: a digest of each example's index, label and pixels."""
    ids = []
    for index, label, image in zip(indices.tolist(), y.tolist(), x.cpu().contiguous(), strict=True):
        digest = hashlib.blake2b(f"{index} {label}".encode() + image.numpy().tobytes(), digest_size=8).digest()
        ids.append(int.from_bytes(digest, "big", signed=True))
    return torch.tensor(ids, dtype=torch.int64)
