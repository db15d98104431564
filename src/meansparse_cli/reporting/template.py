"""Pages by templates (jinja2), which lie in the package that they are for, and how all of these write values."""

import html
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ..stats.format import in_points, percent
from ..stats.paired import Accuracy, PairedDifference
from .table import pipes


@cache
def environment(package: str, *, is_html: bool = False) -> Environment:
    """The templates of ``package``. In HTML every value is escaped, as ``html.escape`` does; in Markdown none is."""
    made = Environment(
        loader=PackageLoader(package),
        autoescape=is_html,
        finalize=_escaped if is_html else None,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "thousands": "{:,}".format,
        "percent": _in_percent,
        "points": in_points,
        "as_code": "`{}`".format,
        "row": pipes,
    }
    return made


def _escaped(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def _in_percent(number: Accuracy | PairedDifference | float | None) -> str:
    """With its standard error; a difference in points; empty for None."""
    if isinstance(number, Accuracy):
        return percent(number.fraction, number.standard_error)
    if isinstance(number, PairedDifference):
        return in_points(number.difference, number.standard_error)
    return percent(number)
