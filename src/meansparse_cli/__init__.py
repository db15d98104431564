"""MeanSparse for adversarially trained image classifiers (arXiv 2406.05927), from the command line.

>>> from meansparse_cli import load_sparsified
>>> model = load_sparsified("runs/digits-Linf-digits")  # doctest: +SKIP

From the command line down: ``cli``, ``settings``, ``stages``, ``runs``, ``engine``, ``attacks``, ``operator``; each
package says what it is for. ``docs/development/architecture.md`` in the repository is the whole picture.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_sparsified"]

if TYPE_CHECKING:
    from .runs.operators import load_sparsified


def __getattr__(name: str) -> Any:
    # torch is loaded when something is used, so that `meansparse --help` stays fast
    if name == "load_sparsified":
        from .runs.operators import load_sparsified

        return load_sparsified
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
