"""Which of a model's sites are used: ``--sites RULE``.

A rule is one part or several, joined by commas; it chooses what any of its parts chooses.

    all               every site
    main-path         inside a residual block, on the way that a skip connection goes around (paper, Table 11)
    after-addition    fed by a residual addition, directly or through a normalisation (paper, Table 11)
    first:N  last:N   the first or last N in call order; first:N is the cumulative column of Table 10 at index N - 1
    single:N  N       the site with index N, as in Table 10: sites are numbered in call order from 0
    7-12  7:12        indices from 7 to 12, both ends included
    layer1.0.relu     a site's name, or the path of its module, which means all calls of it
    layer1.*          names that match a pattern of ``*``, ``?`` and ``[...]``

A rule that is ``published``, or begins with ``published:``, chooses among other sites: those that the authors of
MeanSparse used on this model (``models/published_sites.py``), as in ``published:0-99`` or ``published:*meansparse_2``.

An index is a site's place in the full list that ``meansparse sites`` prints, gates included, so it means the same site
whatever else is chosen. In a post-activation ResNet-18, index 0 is the stem, odd indices are on the main path and even
ones come after an addition; like the stem there, a site can belong to neither family.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..errors import SiteError

if TYPE_CHECKING:
    from .find import Site

PUBLISHED = "published"
FAMILIES = ("all", "main-path", "after-addition")
_COUNTED = re.compile(r"(first|last|single):(.*)")
_RANGE = re.compile(r"(\d+)\s*[-:]\s*(\d+)")
_LISTED = "meansparse sites --model NAME"


def parse_rule(value: object) -> str:
    """A rule as text, once each of its parts is known to be well formed; a list (in YAML) is joined by commas.

    Raises ValueError. Whether a model has such sites is for ``select_sites`` to say.
    """
    if isinstance(value, str) and value.strip().startswith(f"{PUBLISHED}:"):
        return f"{PUBLISHED}:{parse_rule(value.strip().removeprefix(f'{PUBLISHED}:'))}"
    values = value if isinstance(value, list | tuple) else [value]
    parts = [part.strip() for item in values for part in str(item).split(",") if part.strip()]
    if not parts:
        raise ValueError("the rule is empty; expected for example all, main-path, first:5, 7-12 or layer1.*")
    for part in parts:
        if counted := _COUNTED.fullmatch(part):
            least = 0 if counted[1] == "single" else 1
            if not counted[2].isdecimal() or int(counted[2]) < least:
                raise ValueError(f"{part!r}: {counted[1]}:N needs a whole number from {least} up")
        elif (ends := _RANGE.fullmatch(part)) and int(ends[1]) > int(ends[2]):
            raise ValueError(f"{part!r} is an empty range: its ends are included, and the first must not be larger")
    return ",".join(parts)


def among_published(rule: str) -> str | None:
    """What a rule chooses among the authors' own sites; None if it chooses among the model's activations."""
    if rule == PUBLISHED:
        return "all"
    return rule.removeprefix(f"{PUBLISHED}:") if rule.startswith(f"{PUBLISHED}:") else None


def select_sites(sites: Sequence[Site], rule: str = "all", *, include_gates: bool = True) -> list[Site]:
    """The sites that ``rule`` chooses, in their order and as they are: each keeps its own name and index.

    ``sites`` are those of ``find_sites``, or of ``published_sites`` for a rule that says so, or some of them (a
    checkpoint's). With ``include_gates=False`` no rule chooses a gate. Raises SiteError for a part that chooses
    nothing, with the nearest names; ValueError for a malformed rule.
    """
    chosen = chosen_by(sites, rule, include_gates=include_gates)
    return [site for site in sites if site.index in chosen]


def chosen_by(sites: Sequence[Site], rule: str, *, include_gates: bool = True) -> dict[int, str]:
    """Index of each chosen site, and the part of the rule that chose it (the first that does)."""
    candidates = [site for site in sites if include_gates or not site.gate]
    if not candidates:
        raise SiteError(
            "every activation of this model is a gate" if sites else "there is no site to choose from",
            hint="use the gates too: --include-gates" if sites else None,
        )
    chosen: dict[int, str] = {}
    for part in parse_rule(among_published(rule) or rule).split(","):
        found = _matching(candidates, part)
        if not found:
            raise _nothing_chosen(part, candidates, _matching(sites, part))
        for site in found:
            chosen.setdefault(site.index, part if among_published(rule) is None or part != "all" else PUBLISHED)
    return chosen


def _matching(sites: Sequence[Site], part: str) -> list[Site]:
    """What one part chooses. An index that does not exist chooses nothing, at the end of a range too."""
    if part == "all":
        return list(sites)
    if part == "main-path":
        return [site for site in sites if site.main_path]
    if part == "after-addition":
        return [site for site in sites if site.after_addition]
    if counted := _COUNTED.fullmatch(part):
        n = int(counted[2])
        if counted[1] == "single":
            return [site for site in sites if site.index == n]
        if n > len(sites):
            return []
        return list(sites[:n] if counted[1] == "first" else sites[-n:])
    if part.isdecimal():
        return [site for site in sites if site.index == int(part)]
    if ends := _RANGE.fullmatch(part):
        first, last = int(ends[1]), int(ends[2])
        if last > max((site.index for site in sites), default=-1):
            return []
        return [site for site in sites if first <= site.index <= last]
    exact = [site for site in sites if part in (site.name, site.path)]
    return exact or [site for site in sites if fnmatchcase(site.name, part)]


def _nothing_chosen(part: str, candidates: Sequence[Site], with_gates: Sequence[Site]) -> SiteError:
    indices, names = index_ranges(candidates), [site.name for site in candidates]
    if part.startswith(("first:", "last:")):
        return SiteError(
            f"--sites {part}: there are only {len(candidates)} sites", hint=f"they are listed by: {_LISTED}"
        )
    if with_gates:
        what = with_gates[0].name if len(with_gates) == 1 else f"{len(with_gates)} sites"
        return SiteError(
            f"--sites {part}: {what} would match, but gates are not used", hint="use them too: --include-gates"
        )
    if part in FAMILIES:
        return SiteError(f"--sites {part}: this model has no such site", hint=f"what it has: {_LISTED}")
    if part.isdecimal() or part.startswith("single:") or _RANGE.fullmatch(part):
        return SiteError(f"--sites {part}: the indices are {indices}", hint=f"they are listed by: {_LISTED}")
    near = difflib.get_close_matches(part, names + list(FAMILIES), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return SiteError(f"--sites {part}: no site has such a name", hint=f"{hint}all names: {_LISTED}")


def index_ranges(sites: Sequence[Site]) -> str:
    """Indices in short: ``0-3, 5, 7-16``."""
    runs: list[list[int]] = []
    for site in sites:
        if runs and site.index == runs[-1][1] + 1:
            runs[-1][1] = site.index
        else:
            runs.append([site.index, site.index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
