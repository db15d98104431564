"""How values are written: budgets, grids of alpha, site rules, shards, names; a parser refuses what means nothing."""

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BeforeValidator, Field

from ..data.facts import KNOWN_DATASETS
from ..errors import ConfigError
from ..sites.rules import parse_rule
from .shard import parse_shard

MOST_IN_A_GRID = 1000


def as_spelled(*names: str) -> BeforeValidator:
    """``linf`` for ``Linf``: one of ``names`` in whatever case it was typed; anything else stays as it is."""
    known = {name.lower(): name for name in names}
    return BeforeValidator(lambda value: known.get(value.lower(), value) if isinstance(value, str) else value)


def parse_eps(value: object) -> str:
    """``8/255`` or ``0.03`` -> the text itself, once it is known to be a positive number."""
    text = str(value).strip()
    try:
        number = _exact(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"eps is {text!r}; expected a number or a fraction such as 8/255") from error
    if number <= 0:
        raise ValueError(f"eps is {text}; it must be above 0")
    return text


def _exact(text: str) -> Fraction:
    """The number as written; ValueError also where its digits would take forever, as those of 1e99999999."""
    if len(text) > 40 or re.search(r"e[+-]?\d{3}", text, re.IGNORECASE):
        raise ValueError(text)
    return Fraction(text)


def eps_value(text: str) -> float:
    """The number behind ``8/255``."""
    return float(Fraction(text))


def eps_text(value: float) -> str:
    """A budget as people write it: ``8/255`` where it is a multiple of 1/255.

    >>> eps_text(8 / 255), eps_text(0.5)
    ('8/255', '0.5')
    """
    levels = round(255 * value)
    return f"{levels}/255" if levels / 255 == value else f"{value:.12g}"


def parse_eps_grid(value: object) -> str:
    """One eps, ``2/255,8/255``, ``1/255:16/255:1/255`` (from, to, step; ends included) or a list -> the text itself."""
    text = ",".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value).strip()
    for eps in eps_grid(text):
        parse_eps(eps)
    return text


def eps_grid(text: str) -> tuple[str, ...]:
    """Every eps that the text means, ascending, each once, as it would be written."""
    if ":" not in text:
        parts = [parse_eps(part) for part in text.split(",") if part.strip()]
        if not parts:
            raise ValueError("the list of eps is empty")
        return tuple(sorted(dict.fromkeys(parts), key=Fraction))
    values = _range(text, "eps is", "1/255:16/255:1/255", _exact)
    written_over = {part.partition("/")[2] for part in text.split(":")} - {""}
    over = int(written_over.pop()) if len(written_over) == 1 else None
    if over is not None and all((value * over).denominator == 1 for value in values):
        return tuple(f"{value * over}/{over}" for value in values)
    return tuple(f"{float(value):.12g}" for value in values)


def check_eps(text: str, norm: str) -> None:
    """Refuse a budget that covers the whole image, the usual sign of pixel units 0..255."""
    limit = {"Linf": 1.0, "L2": 8.0}[norm]
    if eps_value(text) >= limit:
        hint = f"images are in [0, 1]: did you mean --eps {text}/255?" if norm == "Linf" else "images are in [0, 1]"
        raise ConfigError(f"eps is {text} in {norm}; expected less than {limit:g}", hint=hint)


def eps_for(given: str | None, dataset: str, norm: str) -> str:
    """The budget, or grid of budgets, as text: the one given, else the data set's own; refused beyond its limit."""
    facts = KNOWN_DATASETS.get(dataset)
    eps = given or (facts.eps[norm] if facts is not None else None)
    if eps is None:
        raise ConfigError("no eps is known for this data set", hint="give one: --eps 8/255")
    for one in eps_grid(eps):
        check_eps(one, norm)
    return eps


def parse_alphas(value: object) -> tuple[float, ...]:
    """``0.05:0.5:0.05`` (from, to, step; ends included) or ``0.1,0.2`` or a list -> numbers as given."""
    parts: Sequence[object] = value if isinstance(value, list | tuple) else str(value).split(",")
    if isinstance(value, str) and ":" in value:
        parts = [float(n) for n in _range(value, "alphas are", "0.05:0.5:0.05", _exact)]
    try:
        numbers = tuple(float(str(part)) for part in parts if str(part).strip())
    except ValueError as error:
        raise ValueError(f"alphas are {value!r}; each must be a number") from error
    if not numbers:
        raise ValueError("the list of alphas is empty")
    for number in numbers:
        if not 0 <= number < math.inf:
            raise ValueError(
                f"alpha is {number}; it must be 0 or above, in standard deviations (the paper: 0.05 to 0.5)"
            )
    return numbers


def parse_batch_size(value: object) -> object:
    """``auto``, or a number of images."""
    text = str(value).strip().lower()
    if text != "auto" and not (re.fullmatch("[0-9]{1,9}", text) and int(text)):
        raise ValueError(f"the batch size is {value!r}; expected auto, or a number of images from 1 on")
    return text


def _range(text: str, these_are: str, example: str, number: Callable[[str], Fraction]) -> list[Fraction]:
    """``FROM:TO:STEP``, ends included; ``these_are`` begins the message of a ValueError."""
    name, verb = these_are.split()
    try:
        first, last, step = (number(part) for part in text.split(":"))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{these_are} {text!r}; expected FROM:TO:STEP such as {example}") from error
    if step <= 0 or last < first:
        raise ValueError(f"{name} {text!r} {verb} an empty range: FROM must not exceed TO, and STEP must be above 0")
    if (n := int((last - first) / step) + 1) > MOST_IN_A_GRID:
        raise ValueError(f"{name} {text!r} are {n:,} values, more than {MOST_IN_A_GRID:,}")
    return [first + i * step for i in range(n)]


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Count = Annotated[int, Ge(1), Le(2**31 - 1)]
BatchSize = Annotated[Literal["auto"] | Count, BeforeValidator(parse_batch_size)]
Whole = Annotated[int, Ge(0), Le(2**31 - 1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Few = Annotated[int, Ge(0), Le(1024)]
"""Of what is taken from the machine at once: processes, pixels of padding."""
Width = Annotated[int, Ge(1), Le(1024)]
"""Channels of the first layer: a ResNet-18 of 1024 has three billion weights."""
NotNegative = Annotated[float, Ge(0), Field(allow_inf_nan=False)]
Positive = Annotated[float, Gt(0), Field(allow_inf_nan=False)]
EpsText = Annotated[str, BeforeValidator(parse_eps)]
EpsGridText = Annotated[str, BeforeValidator(parse_eps_grid)]
Alpha = Annotated[float, AfterValidator(lambda alpha: parse_alphas((alpha,))[0])]
AlphaGrid = Annotated[tuple[float, ...], BeforeValidator(parse_alphas)]
SiteRule = Annotated[str, BeforeValidator(parse_rule)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_as_tuple)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
ShardText = Annotated[str, BeforeValidator(parse_shard)]
