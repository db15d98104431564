"""Pages by templates (jinja2), which lie in the package that they are for, and how all of these write values."""

import html
import math
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ..foreign import visible
from ..stats.format import in_points, percent
from .table import pipes


def fill(package: str, template: str, *, is_html: bool = False, **values: Any) -> str:
    """The page that ``template`` of ``package`` makes of ``values``."""
    return _environment(package, is_html).get_template(template).render(values)


@cache
def _environment(package: str, is_html: bool) -> Environment:
    """The templates of ``package``: in HTML values are escaped, as ``html.escape`` does; in Markdown None is empty."""
    made = Environment(
        loader=PackageLoader(package),
        autoescape=is_html,
        finalize=_escaped if is_html else _in_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "thousands": "{:,}".format,
        "percent": percent,
        "points": in_points,
        "round_up": round_up,
        "as_code": "`{}`".format,
        "row": pipes,
    }
    made.globals["anchor"] = lambda title, n_words=4: "-".join(re.findall(r"[a-z0-9.]+", title.lower())[:n_words])
    return made


def round_up(number: float) -> float:
    """To one digit, 1 or an even one: half of it is short as well.

    >>> [round_up(n) for n in (0.0948, 4.7, 0.02, 61)]
    [0.1, 6.0, 0.02, 80.0]
    """
    size = 10.0 ** math.floor(math.log10(number))
    return round(size * next(step for step in (1, 2, 4, 6, 8, 10) if step * size >= number * (1 - 1e-9)), 12)


def _escaped(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(visible(str(value))))


def _in_markdown(value: Any) -> Any:
    return "" if value is None else visible(value) if isinstance(value, str) else value
