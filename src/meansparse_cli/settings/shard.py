"""``meansparse evaluate --shard I/N``: one of N jobs that share the examples of an evaluation.

Shard I has every Nth example, so that a larger ``--n-examples`` keeps each where it was. All shards write into the
state folder of the whole evaluation, under names of their own; the command without ``--shard`` reads them all.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shard:
    """Shard ``number`` (from 1) of ``count``."""

    number: int
    count: int

    def positions(self, n: int) -> Sequence[int]:
        """Its positions among n examples, ascending."""
        return range(self.number - 1, n, self.count)

    @property
    def name(self) -> str:
        """For files and folders."""
        return f"shard-{self.number}-of-{self.count}"

    def files_in(self, state_folder: Path) -> list[Path]:
        """All that this shard wrote into the state of the evaluation, at every eps."""
        return sorted(state_folder.rglob(f"{self.name}-*"))

    def count_in(self, state_folder: Path) -> int:
        """How many files that is, copies apart."""
        return sum(path.suffix != ".copy" for path in self.files_in(state_folder))


def read_shard(text: str) -> Shard:
    """``3/8`` -> the third of eight; ``ValueError`` for anything else.

    >>> list(read_shard("2/3").positions(8))
    [1, 4, 7]
    """
    number, slash, count = text.strip().partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"shard is {text!r}; expected I/N with I from 1 to N, such as 3/8")
    return Shard(int(number), int(count))


def shard_of(name: str) -> str:
    """``shard-3-of-8``, as files have it -> ``3/8``."""
    return name.removeprefix("shard-").replace("-of-", "/")


def shard_of_job(environment: Mapping[str, str]) -> Shard:
    """Which of how many this process is: of a Slurm array, of ``torchrun``, or both. ``ValueError`` where of neither.

    >>> shard_of_job({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_COUNT": "8"})
    Shard(number=3, count=8)
    """
    number, count = 0, 1
    try:
        if "SLURM_ARRAY_TASK_ID" in environment:
            first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{word}", 1)) for word in ("MIN", "STEP"))
            number = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
            count = int(environment["SLURM_ARRAY_TASK_COUNT"])
        if "RANK" in environment:
            n_ranks = int(environment["WORLD_SIZE"])
            number, count = number * n_ranks + int(environment["RANK"]), count * n_ranks
    except (KeyError, ValueError) as error:
        raise ValueError(f"shard is auto, and the job's variables make no sense: {error}") from error
    if not environment.keys() & {"SLURM_ARRAY_TASK_ID", "RANK"}:
        raise ValueError("shard is auto, and this is a job neither of a Slurm array nor of torchrun; expected I/N")
    return read_shard(f"{number + 1}/{count}")


def shard_here() -> str | None:
    """``I/N`` of this process in an array of jobs; None where there is no array."""
    return parse_shard("auto") if "SLURM_ARRAY_TASK_ID" in os.environ else None


def parse_shard(value: object) -> str:
    """The text of a shard, once it is known to be one: ``03/8`` is ``3/8``, ``auto`` what the job's variables say."""
    text = str(value).strip()
    shard = shard_of_job(os.environ) if text == "auto" else read_shard(text)
    return f"{shard.number}/{shard.count}"
