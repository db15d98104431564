"""Does a rate, or a paired difference, lie beyond a bound that is not 0? By tests that hold where few examples decide.

Each answers for both sides at once: 1 above the bound, -1 below it, 0 not settled. Where the truth lies at the bound
itself, about 1 sample in 40 is put on either side of it, up to 1 in 20 of a few hundred pairs. For a bound of 0 there
is ``paired.side_of_zero``.
"""

import math

from .paired import Z_95

LEVEL = 0.025


def side_of_rate(n_right: int, n: int, bound: float) -> int:
    """``n_right`` of ``n`` examples against ``bound`` in (0, 1); exact binomial (Clopper and Pearson 1934).

    >>> side_of_rate(0, 300, 0.01), side_of_rate(0, 400, 0.01)
    (0, -1)
    """
    from scipy.stats import binom

    if binom.cdf(n_right, n, bound) < LEVEL:
        return -1
    return 1 if binom.sf(n_right - 1, n, bound) < LEVEL else 0


def side_of_difference(gained: int, lost: int, n: int, bound: float) -> int:
    """(``gained`` - ``lost``) / ``n`` of n pairs against ``bound`` in (-1, 1), not 0; score test (Tango 1998).

    The standard error is what it would be if the truth were the bound: where nothing changed sides it is not 0.

    >>> side_of_difference(0, 0, 400, -0.005), side_of_difference(0, 0, 1000, -0.005)
    (0, 1)
    """
    b = -(gained + lost) + (2 * n - gained + lost) * bound
    c = -lost * bound * (1 - bound)
    lost_share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)  # most likely share of losses, given the bound
    variance = n * (2 * lost_share + bound * (1 - bound))
    z = (gained - lost - n * bound) / math.sqrt(max(variance, 1e-300))
    return int(z > Z_95) - int(z < -Z_95)
