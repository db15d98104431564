"""Where a site stands to the residual additions of a network.

Every feature tensor carries the layers and sites it was computed from, as bits of one number. An addition is residual
if its two operands are features of different ancestry that share a layer or a site: ``x + conv(x)`` is one; adding a
bias, a position embedding, a function of the same ``x`` (inside a hand-written GELU) or another network's logits is
none.

A site comes *after an addition* if the sum reaches it with nothing in between but what treats every value, or every
channel, on its own and linearly: a normalisation, a scaling, a change of layout. In a pre-activation network that is a
batch norm, and the operator commutes with it: the band of ``alpha`` standard deviations around a channel's mean holds
the same values before and after. A site is on the *main path* if it does not come after an addition and feeds just one
of the two operands of some residual addition, so that a skip connection goes around it (odd indices in the paper's
Table 11).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .channels import MOVES_ELEMENTS

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_PRODUCTS = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__"})
_DIFFERENCES = frozenset({"sub", "sub_", "__sub__", "__isub__"})
_QUOTIENTS = frozenset({"div", "div_", "__truediv__", "__itruediv__"})
_AFFINE = _ADDITIONS | _DIFFERENCES | _PRODUCTS | _QUOTIENTS
_NORMALISES = "batch_norm layer_norm group_norm instance_norm rms_norm dropout dropout2d dropout_ feature_dropout"
_COPIES = "contiguous to type type_as float half double bfloat16 clone detach alias requires_grad_"
_KEEPS_ADDITION = MOVES_ELEMENTS | frozenset(f"{_NORMALISES} {_COPIES}".split())
_LAYERS = ("conv", "linear", "matmul", "bmm", "einsum", "attention", "pool", "interpolate")
_IMAGE = 1


@dataclass(frozen=True)
class Provenance:
    """What is known of a tensor: its channel axis, what it was computed from, and whether it is a residual sum."""

    axis: int | None = None
    ancestors: int = 0
    """Bit 0 is the image, the others are layers and sites. 0: not computed from the image at all."""
    after_addition: bool = False


class ResidualPaths:
    """Gives out the bits, and remembers additions and products of features."""

    def __init__(self) -> None:
        self.n_bits = 1
        self.additions: list[tuple[int, int]] = []
        self.gatings: list[tuple[int, int]] = []

    def new_bit(self) -> int:
        self.n_bits += 1
        return 1 << (self.n_bits - 1)

    def ancestry_after(self, func: Callable[..., Any], operands: Sequence[tuple[Provenance, int]]) -> tuple[int, bool]:
        """Ancestors of the result of ``func``, and whether it is a residual sum.

        ``operands`` are the tensors it received, each with its number of elements that are not copies (``expand``).
        """
        name = getattr(func, "__name__", "")
        features = [(p, n) for p, n in operands if p.ancestors]
        ancestors = 0
        for p, _ in features:
            ancestors |= p.ancestors
        if not features:
            return 0, False
        if len(features) == 2:
            (a, n_a), (b, n_b) = features
            if name in _ADDITIONS and a.ancestors != b.ancestors and a.ancestors & b.ancestors > _IMAGE:
                self.additions.append((a.ancestors, b.ancestors))
                return ancestors, True
            if name in _PRODUCTS and n_a != n_b:
                scale, scaled = (a, b) if n_a < n_b else (b, a)
                self.gatings.append((scale.ancestors, scaled.ancestors))
        if any(word in name for word in _LAYERS):
            return ancestors | self.new_bit(), False
        keeps = name in _KEEPS_ADDITION or (name in _AFFINE and len(features) == 1)
        return ancestors, keeps and features[0][0].after_addition

    def on_main_path(self, bit: int) -> bool:
        """Whether a residual addition has this site among the ancestors of one operand and not of the other."""
        return any(bool(a & bit) != bool(b & bit) for a, b in self.additions)

    def scales_features(self, bit: int) -> bool:
        """Whether this site feeds a factor that is broadcast, and not the features that the factor scales."""
        return any(scale & bit and not scaled & bit for scale, scaled in self.gatings)
