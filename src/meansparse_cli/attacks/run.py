"""``run_attack``: one attack on n examples, from the clean images to judged results."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import AttackError, ConfigError, DataError
from ..operator.sparsify import backward_rule
from . import find_attack
from .adaptive import adaptive
from .apgd import apgd
from .budget import enforce_budget
from .counting import CountedModel, device_of
from .fab import fab
from .folding import N_PROBES, find_folds, folded
from .judge import fresh_logits, full_float32, is_misclassified, under_attack
from .pgd import pgd
from .precision import Precision, search_precision
from .result import AttackResult, Budget
from .square import square
from .task import AttackTask, SearchOutcome

SEARCHES: dict[str, Callable[..., SearchOutcome]] = {
    "apgd-ce": partial(apgd, loss="ce"),
    "apgd-dlr": partial(apgd, loss="dlr"),
    "apgd-t": partial(apgd, loss="dlr-targeted"),
    "fab-t": fab,
    "square": square,
    "pgd": pgd,
    "adaptive": adaptive,
}
"""Family -> what is called with an ``AttackTask`` and the options of the ``AttackSpec``."""


@torch.inference_mode(False)
def run_attack(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    *,
    budget: Budget,
    seed: int,
    batch_size: int,
    n_classes: int,
    on_progress: Callable[[int], None] | None = None,
    search_model: nn.Module | None = None,
    precision: Precision | None = None,
) -> AttackResult:
    """See ``meansparse_cli.attacks.run_attack``, which is this function with torch imported late."""
    spec = find_attack(name)
    _check_arguments(x, y, indices, budget, batch_size, n_classes)
    started = time.perf_counter()
    advance = on_progress or _no_progress
    x = x.detach()
    y, indices = y.to(x.device, torch.int64), indices.to("cpu", torch.int64)
    device = device_of(model, x.device)
    counted = CountedModel(model, n_classes=n_classes, device=device)
    # penalised attacks put hooks on the operators, which a compiled form may not call
    fast_model = model if search_model is None or spec.search == "adaptive" else search_model
    fast, exact = (
        CountedModel(searched, n_classes=n_classes, device=device, base_gradient=spec.backward == "base")
        for searched in (fast_model, model)
    )
    adversarial = x.clone(memory_format=torch.contiguous_format)
    passes = torch.tensor([[1, 0]]).repeat(len(x), 1)  # forward and backward, an example; one for the clean image
    rejected = torch.zeros(len(x), dtype=torch.int64)

    with under_attack(model):
        clean_logits = fresh_logits(counted, x, batch_size=batch_size)
        broken = clean_logits.argmax(dim=1) != y
        if broken.any():
            advance(int(broken.sum()))
        rows = (~broken).nonzero().squeeze(1)
        is_compiled = hasattr(fast_model, "_orig_mod")  # and would be once more in its folded form
        can_fold = len(rows) > 0 and not is_compiled
        folds = find_folds(fast_model, x[rows[:N_PROBES]].to(device).contiguous()) if can_fold else []
        # An example leaves the search at its first break. Where that break was one of low precision alone (autocast,
        # TF32), stopping there would flatter the model: those examples are searched once more, in full precision.
        for searched, computing, form in (
            (fast, search_precision(device, precision), folds),
            (exact, full_float32(device), []),
        ):
            if len(rows) == 0:
                break
            task = AttackTask(
                attack=spec.start,
                model=searched,
                x=x[rows].contiguous(),
                y=y[rows],
                indices=indices[rows.cpu()],
                clean_logits=clean_logits[rows],
                budget=budget,
                seed=seed,
                batch_size=batch_size,
                advance=advance,
            )
            with computing, folded(form), backward_rule(model, "true" if spec.backward == "base" else spec.backward):
                outcome = SEARCHES[spec.search](task, **dict(spec.options))
            if outcome.passes is not None:
                passes[rows.cpu()] += outcome.passes
            claimed = outcome.claimed.to(x.device)
            points = enforce_budget(outcome.points.to(x.device)[claimed], task.x[claimed], budget)
            upheld = is_misclassified(counted, points, task.y[claimed], batch_size=batch_size)
            rows = rows[claimed]
            passes[rows.cpu(), 0] += 1
            adversarial[rows[upheld]] = points[upheld]
            broken[rows[upheld]] = True
            rows = rows[~upheld]
            rejected[rows.cpu()] += 1
            advance = _no_progress

    return AttackResult(
        adversarial=adversarial,
        broken=broken,
        passes=passes,
        rejected=rejected,
        seconds=time.perf_counter() - started,
        seed=seed,
    )


def _no_progress(n_examples: int) -> None:
    """Where nobody asked, or the examples have been told already."""


def _check_arguments(x: Tensor, y: Tensor, indices: Tensor, budget: Budget, batch_size: int, n_classes: int) -> None:
    if budget.norm not in ("Linf", "L2"):
        raise ConfigError(f"norm {budget.norm!r} is not known", hint="Use Linf or L2.")
    if not (math.isfinite(budget.eps) and budget.eps >= 0) or (budget.norm == "Linf" and budget.eps > 1):
        raise ConfigError(
            f"eps = {budget.eps} cannot be used with norm {budget.norm}",
            hint="eps is in pixel units of [0, 1] images: 8/255, not 8.",
        )
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size} is below 1")
    if n_classes < 2:
        raise AttackError(f"a classifier of {n_classes} class cannot be attacked")
    n = x.shape[0]
    if x.ndim != 4 or x.dtype != torch.float32 or y.shape != (n,) or indices.shape != (n,):
        raise DataError(
            f"got images {x.dtype} {tuple(x.shape)}, labels {tuple(y.shape)}, indices {tuple(indices.shape)}; expected "
            "float32 (n, channels, height, width), (n,) and (n,)"
        )
    if n == 0:
        return
    if not (x.min() >= 0 and x.max() <= 1):  # false for NaN as well
        raise DataError(f"pixels go from {x.min().item():g} to {x.max().item():g}, expected [0, 1]")
    if y.min() < 0 or y.max() >= n_classes:
        raise DataError(f"labels go from {int(y.min())} to {int(y.max())}, the model has {n_classes} classes")
