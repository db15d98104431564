"""What an evaluation keeps on disk, so that it can be killed anywhere and go on with the same result.

    <state folder>/settings.json                what every outcome here depends on
    <state folder>/examples.pt                  a digest of each example
    <state folder>/<model>/<attack>/<number>.pt one chunk of examples under one attack, or ``clean``

A chunk is written whole or not at all, once its attack is over, and never again: a kill costs the chunk in flight. Chunks
are cut in order from the examples that an attack has not faced yet, so that one that is done again holds the same
examples as before; a larger ``n_examples`` only appends. Shards put ``shard-I-of-N`` into the names of all their files, so
that several may write at once, or into folders that are put together later; everybody reads what anybody wrote, once its
settings are found to be the same.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attacks.result import AttackResult
from ..errors import ArtifactError
from ..files import load_torch, save_torch, write_bytes

SETTINGS = "settings.json"
FORMAT = 5  # raise it when what an attack does, or these files, change


@dataclass(frozen=True)
class Chunk:
    """What one attack did to m examples on one model.

    ``positions`` (m,) int64, ascending, in the whole evaluation; ``broken`` (m,) bool; ``adversarial`` (number broken, channels, height, width)
    float32, the images of the broken examples in their order. ``passes`` (m, 2): forward and backward passes of each.
    ``rejected`` (m,): breaks that the attack claimed and its judge did not confirm.
    """

    positions: Tensor
    broken: Tensor
    passes: Tensor
    rejected: Tensor
    adversarial: Tensor | None = None
    seconds: float = 0.0


def chunk_of(positions: Tensor, result: AttackResult) -> Chunk:
    """The result of an attack on the examples at ``positions`` (m,); images that broke nothing are dropped."""
    broken = result.broken.cpu()
    return Chunk(
        positions,
        broken,
        result.passes,
        result.rejected,
        result.adversarial.detach()[result.broken].float().cpu(),
        result.seconds,
    )


def read_chunks(folder: Path, model: str, attack: str) -> Iterator[tuple[str, Chunk]]:
    """The finished chunks in a state folder, with the names of their files; none where the attack never ran."""
    for file in sorted((folder / model / attack).glob("*.pt")):
        try:
            chunk = Chunk(**load_torch(file))
            n_images = 0 if chunk.adversarial is None else len(chunk.adversarial)
            lengths = {len(chunk.positions), len(chunk.broken), len(chunk.passes), len(chunk.rejected)}
            whole = len(lengths) == 1 and n_images in (0, int(chunk.broken.sum()))
        except (TypeError, AttributeError):
            whole = False
        if not whole:
            raise ArtifactError(f"{file} is not a chunk of an evaluation", hint=f"delete it and run again: {file}")
        yield file.stem, chunk


def part_of(chunk: Chunk, rows: Tensor) -> Chunk:
    """The examples of a chunk whose row is 0 or above, at these rows (m,) in the place of their positions."""
    kept = rows >= 0
    return replace(
        chunk,
        positions=rows[kept],
        broken=chunk.broken[kept],
        passes=chunk.passes[kept],
        rejected=chunk.rejected[kept],
        adversarial=None if chunk.adversarial is None else chunk.adversarial[kept[chunk.broken]],
    )


def _shown(value: object) -> str:
    """A setting as a person compares it: a long one by its beginning and a short hash of the whole."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def recorded_setting(folder: Path, name: str) -> Any:
    """A setting of what was begun in a state folder, at any eps of a grid; None where nothing was.

    Whoever goes on elsewhere, or gathers shards, takes over what was left to the device.
    """
    for file in sorted(folder.glob(f"**/*{SETTINGS}")):
        with contextlib.suppress(ValueError, AttributeError):  # a damaged file is refused where it is used
            return json.loads(file.read_text()).get(name)
    return None


class EvaluationState:
    """The state folder of one evaluation, as the examples at ``positions`` (n,), ascending, see it.

    To its caller the positions of a chunk are rows, 0 to n - 1; examples elsewhere are left out. ``shard``: the name of
    the shard that these examples are. ``settings`` must be those of everybody who wrote here. ``attack_versions``
    (attack -> what it does) must agree for the attacks both know; further attacks may join later. Raises
    ``ArtifactError`` with the differences.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        attack_versions: dict[str, str],
        positions: Tensor,
        shard: str | None = None,
    ) -> None:
        self.folder, self.positions = folder, positions
        self.prefix = "" if shard is None else f"{shard}-"
        now = {"format": FORMAT, **settings}
        own = folder / f"{self.prefix}{SETTINGS}"
        known: dict[str, str] = {}
        for file in sorted(folder.glob(f"*{SETTINGS}")):
            theirs = _attacks_of(file, now, attack_versions, shard)
            if file == own:
                known = theirs
        for chunk in folder.glob("*/*/*.pt"):
            file = folder / f"{_prefix_of(chunk.stem)}{SETTINGS}"
            if not file.exists():
                raise ArtifactError(
                    f"{folder} has outcomes and no {file.name}",
                    hint=_anew(folder, _shard_of(chunk.stem), shard),
                )
        if not attack_versions.items() <= known.items() or not own.exists():
            content = now | {"attacks": known | attack_versions}
            write_bytes(own, json.dumps(content, indent=1, sort_keys=True).encode())

    def chunks(self, model: str, attack: str) -> Iterator[tuple[str, Chunk]]:
        """The finished chunks of one attack on one model with their names, one in memory at a time; no example twice."""
        row_of = torch.full((int(self.positions.max()) + 1,), -1, dtype=torch.int64)
        row_of[self.positions] = torch.arange(len(self.positions))
        for name, chunk in read_chunks(self.folder, model, attack):
            rows = torch.full_like(chunk.positions, -1)
            known = chunk.positions < len(row_of)
            rows[known] = row_of[chunk.positions[known]]
            if (rows >= 0).any():
                yield name, part_of(chunk, rows)
            row_of[chunk.positions[known]] = -1  # two shardings may have attacked the same example at the same time

    def append(self, model: str, attack: str, chunk: Chunk) -> str:
        """Put a finished chunk on disk, atomically; returns its name."""
        folder = self.folder / model / attack
        own = [file.stem.removeprefix(self.prefix) for file in folder.glob(f"{self.prefix}*.pt")]
        name = f"{self.prefix}{max((int(stem) for stem in own if stem.isdecimal()), default=-1) + 1:06d}"
        save_torch(folder / f"{name}.pt", vars(replace(chunk, positions=self.positions[chunk.positions])))
        return name

    def check_examples(self, indices: Tensor, x: Tensor, y: Tensor) -> None:
        """Refuse other examples than those this evaluation began with: more may follow, none may change.

        ``indices`` (n,), ``x`` (n, channels, height, width), ``y`` (n,).
        """
        now = dict(zip(self.positions.tolist(), example_ids(indices, x, y).tolist(), strict=True))
        for file in sorted(self.folder.glob("*examples.pt")):
            before = _ids_in(file)
            both = now.keys() & before.keys()
            if differ := sum(now[position] != before[position] for position in both):
                mine = _shard_of(self.prefix)
                raise ArtifactError(
                    f"{file} is of other examples: {differ} of {len(both)} are not the same",
                    hint=f"other images, order or preprocessing? {_anew(self.folder, _shard_of(file.stem), mine)}",
                )
        own = self.folder / f"{self.prefix}examples.pt"
        if not own.exists() or len(_ids_in(own)) < len(now):
            save_torch(own, {"positions": self.positions, "ids": torch.tensor(list(now.values()))})


def _attacks_of(file: Path, now: dict[str, Any], attack_versions: dict[str, str], shard: str | None) -> dict[str, str]:
    """The attacks in a file of settings, once these are found to be those of ``now``, and its attacks the ones we know."""
    theirs = _shard_of(file.stem)
    hint = _anew(file.parent, theirs, shard)
    try:
        before: dict[str, Any] = json.loads(file.read_text())
        known = dict(before["attacks"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}", hint=hint) from error
    changed = [
        f"  {key}: {_shown(before.get(key))} -> {_shown(now.get(key))}"
        for key in sorted(({*before} | {*now}) - {"attacks"})
        if before.get(key) != now.get(key)
    ]
    changed += [
        f"  attack {name}: {known[name]} -> {version}"
        for name, version in attack_versions.items()
        if known.get(name, version) != version
    ]
    if changed:
        what = f"{theirs} in {file.parent} has" if theirs else f"{file.parent} holds an evaluation with"
        raise ArtifactError(f"{what} other settings (then -> now):\n" + "\n".join(changed), hint=hint)
    return known


def _prefix_of(stem: str) -> str:
    """What the names of its writer's files begin with: ``shard-1-of-8-000003`` -> ``shard-1-of-8-``, ``000003`` -> nothing."""
    name, dash, _ = stem.rpartition("-")
    return name + dash


def _shard_of(stem: str) -> str | None:
    return _prefix_of(stem).removesuffix("-") or None


def _anew(folder: Path, theirs: str | None, mine: str | None) -> str:
    """How a user throws away what the shard ``theirs`` wrote, typing a command for ``mine``; None: the whole evaluation."""
    if theirs == mine:
        return "add --fresh to throw it away and start anew, or --name NAME to keep both"
    if theirs is None:
        return f"throw it away (rm -r {folder}), or --name NAME to keep both"
    number = theirs.removeprefix("shard-").replace("-of-", "/")
    return f"do that shard anew with the settings of this one (--shard {number} --fresh), or --name NAME to keep both"


def _ids_in(file: Path) -> dict[int, int]:
    content = load_torch(file)
    return dict(zip(content["positions"].tolist(), content["ids"].tolist(), strict=True))


def example_ids(indices: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(n,) int64: a digest of each example's index, label and pixels."""
    ids = []
    for index, label, image in zip(indices.tolist(), y.tolist(), x, strict=True):
        digest = hashlib.blake2b(f"{index} {label}".encode() + image.cpu().numpy().tobytes(), digest_size=8).digest()
        ids.append(int.from_bytes(digest, "big", signed=True))
    return torch.tensor(ids, dtype=torch.int64)
