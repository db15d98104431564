"""``meansparse evaluate --shard I/N``: one of N jobs that share the examples of an evaluation.

Shard I has every Nth example, so that a larger ``--n-examples`` keeps each where it was. All shards write into the
state folder of the whole evaluation, under names of their own; the command without ``--shard`` reads them all.
"""

from collections.abc import Sequence
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


def parse_shard(value: object) -> str:
    """The text of a shard, once it is known to be one: ``03/8`` is ``3/8``."""
    shard = read_shard(str(value))
    return f"{shard.number}/{shard.count}"
