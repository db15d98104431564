"""MeanSparse for adversarially trained image classifiers (arXiv 2406.05927), from the command line.

>>> from meansparse_cli import load_sparsified
>>> model = load_sparsified("runs/digits-Linf-digits")  # doctest: +SKIP

From the command line down: ``cli``, ``settings``, ``stages``, ``runs``, ``engine``, ``attacks``, ``operator``; each
package says what it is for. ``docs/development/architecture.md`` in the repository is the whole picture.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Budget", "__version__", "audit", "calibrate", "compare", "evaluate", "load_sparsified", "sparsify"]

if TYPE_CHECKING:
    from .attacks.problem import Budget
    from .engine.in_python import audit, calibrate, compare, evaluate, sparsify
    from .runs.operators import load_sparsified

_WHERE = {"Budget": "attacks.problem", "load_sparsified": "runs.operators"}
_WHERE |= dict.fromkeys(("audit", "calibrate", "compare", "evaluate", "sparsify"), "engine.in_python")


def __getattr__(name: str) -> Any:
    # torch is loaded when something is used, so that `meansparse --help` stays fast
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
