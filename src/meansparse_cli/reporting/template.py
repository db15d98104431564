"""Pages by templates (jinja2), which lie in the package that they are for, and how all of these write values."""

import html
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ..foreign import visible
from ..stats.format import in_points, percent
from .table import pipes


@cache
def environment(package: str, *, is_html: bool = False) -> Environment:
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
        "as_code": "`{}`".format,
        "row": pipes,
    }
    made.globals["anchor"] = lambda title: "-".join(re.findall(r"[a-z0-9]+", title.lower())[:4])
    return made


def _escaped(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(visible(str(value))))


def _in_markdown(value: Any) -> Any:
    return "" if value is None else visible(value) if isinstance(value, str) else value
