"""The operator and the sums of the statistics on a GPU: one kernel each, that reads every value once.

Imported only where tensors are on a GPU, and Triton is there: it comes with PyTorch's CUDA build. Loads and stores are
in the order of memory, whatever the layout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 2**31 - 1
"""Values that an index of 32 bits can number, which a GPU divides several times faster than one of 64."""

BLOCK = 1024
SPLITS = 256
"""Programs among which the values of a channel are shared."""


def fits(x: Tensor, mean: Tensor, threshold: Tensor) -> bool:
    """Can ``replaced`` take these? Not other layouts, types or sizes than those it says."""
    is_dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    per_row = mean.numel() * len(x)
    return is_dense and x.dtype in TYPES and 0 < x.numel() <= LARGEST and threshold.numel() in (mean.numel(), per_row)


def replaced(x: Tensor, mean: Tensor, threshold: Tensor, kept: Tensor | None) -> Tensor:
    """The operator on ``x``, contiguous or channels-last; ``kept``, bool, becomes true outside the band.

    ``mean`` is of the type of ``x`` and has all of its axes, or none; ``threshold`` may have a number a row.
    """
    axis = max(range(mean.ndim), key=lambda i: mean.shape[i], default=0)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _band[(triton.cdiv(x.numel(), BLOCK),)](
            x,
            (mean.reshape(-1).contiguous(), threshold.reshape(-1).contiguous()),
            out,
            out if kept is None else kept.view(torch.uint8),
            (x.numel(), x.stride(axis), mean.numel(), x.numel() // len(x)),
            KEEP=kept is not None,
            PER_ROW=threshold.numel() > mean.numel(),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return out


def shifted_sums(values: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``values - shift`` and of its square over (outer, channels, inner), of any strides, in float64."""
    outer, channels, inner = values.shape
    side_by_side = values.stride(1) == 1 and channels > 1
    block_c = min(32, triton.next_power_of_2(channels)) if side_by_side else 1
    block = BLOCK // block_c
    splits = max(1, min(SPLITS, triton.cdiv(outer * inner, block)))
    sums = torch.empty((2, splits, channels), dtype=torch.float64, device=values.device)
    with torch.cuda.device_of(values):
        _sums[(triton.cdiv(channels, block_c), splits)](
            values,
            shift,
            sums,
            (outer * inner, inner, channels),
            values.stride(),
            SPLITS=splits,
            BLOCK=block,
            BLOCK_C=block_c,
            enable_fp_fusion=False,
        )
    total, squares = sums.sum(1)
    return total, squares


def agree_with_torch(device: torch.device) -> bool:
    """Do both kernels give on a small tensor, in either layout, what torch's own operations give?"""
    x = torch.linspace(-2, 2, 3 * 5 * 7 * 7, dtype=torch.float64).sin().view(3, 5, 7, 7).to(device, torch.float32)
    mean = torch.linspace(-0.5, 0.5, 5).view(1, 5, 1, 1).to(device)
    threshold = torch.linspace(0.1, 0.9, 5).view(1, 5, 1, 1).to(device)
    mask = (x - mean).abs() <= threshold
    shift = x[0, :, 0, 0].double()
    values = x.double().flatten(2) - shift[:, None]
    for layout in (torch.contiguous_format, torch.channels_last):
        there = x.contiguous(memory_format=layout)
        kept = torch.empty_like(there, dtype=torch.bool)
        is_same = torch.equal(replaced(there, mean, threshold, kept), torch.where(mask, mean, x))
        total, squares = shifted_sums(x.flatten(2), shift)
        sums = torch.stack([total - values.sum((0, 2)), squares - values.square().sum((0, 2))])
        if not (is_same and torch.equal(kept, ~mask) and float(sums.abs().max()) < 1e-9):
            return False
    return True


@triton.jit
def _band(  # type: ignore[no-untyped-def]
    x, band, out, kept, sizes, KEEP: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr
):
    mean, threshold = band
    n, stride, channels, row = sizes
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    channel = (i // stride) % channels
    value = tl.load(x + i, here)
    centre = tl.load(mean + channel, here)
    at = (i // row) * channels + channel if PER_ROW else channel
    limit = tl.load(threshold + at, here).to(tl.float32)
    # rounded to the type of x before it is compared, as PyTorch's own operations do
    distance = tl.abs((value.to(tl.float32) - centre.to(tl.float32)).to(value.dtype)).to(tl.float32)
    inside = distance <= limit
    tl.store(out + i, tl.where(inside, centre, value), here)
    if KEEP:
        tl.store(kept + i, tl.where(inside, 0, 1).to(tl.uint8), here)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    x,
    shift,
    sums,
    sizes,
    strides,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, inner, channels = sizes
    stride_o, stride_c, stride_i = strides
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    known = channel < channels
    base = tl.load(shift + channel, known, 0.0)
    total = tl.zeros((BLOCK, BLOCK_C), dtype=tl.float64)
    squares = tl.zeros((BLOCK, BLOCK_C), dtype=tl.float64)
    for start in range(part * BLOCK, n, SPLITS * BLOCK):
        j = start + tl.arange(0, BLOCK)
        at = (j // inner).to(tl.int64) * stride_o + (j % inner).to(tl.int64) * stride_i
        here = (j < n)[:, None] & known[None, :]
        value = tl.load(x + at[:, None] + channel.to(tl.int64)[None, :] * stride_c, here, 0.0).to(tl.float64)
        value = tl.where(here, value - base[None, :], 0.0)
        total += value
        squares += value * value
    tl.store(sums + part * channels + channel, tl.sum(total, 0), known)
    tl.store(sums + (SPLITS + part) * channels + channel, tl.sum(squares, 0), known)
