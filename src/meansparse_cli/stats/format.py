"""Numbers as people read them: percentages, differences in percentage points, standard errors beside them."""


def percent(fraction: float | None, standard_error: float | None = None, *, digits: int = 2) -> str:
    """A fraction as a percentage, with its standard error in points; empty for None.

    >>> percent(0.6733, 0.0271), percent(0.5, digits=1), percent(None)
    ('67.33 ± 2.71', '50.0', '')
    """
    return "" if fraction is None else _with_error(f"{100 * fraction:.{digits}f}", standard_error)


def in_points(difference: float | None, standard_error: float | None = None, *, digits: int = 2) -> str:
    """A difference of fractions in percentage points, signed; empty for None.

    >>> in_points(-0.0333, 0.0132), in_points(0.02)
    ('-3.33 ± 1.32', '+2.00')
    """
    return "" if difference is None else _with_error(f"{100 * difference:+.{digits}f}", standard_error)


def interval(low: float, high: float, *, digits: int = 2) -> str:
    """An interval of a difference, in percentage points.

    >>> interval(-0.01, 0.005, digits=1)
    '-1.0 to +0.5'
    """
    return f"{in_points(low, digits=digits)} to {in_points(high, digits=digits)}"


def _with_error(text: str, standard_error: float | None) -> str:
    return text if standard_error is None else f"{text} ± {100 * standard_error:.2f}"
