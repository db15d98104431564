"""``run_attack``: one attack on n examples, from the clean images to judged results."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..data.examples import Examples
from ..errors import DataError
from ..operator.active import backward_rule
from ..operator.device import full_float32, search_precision
from ..operator.fitting import halving
from .adaptive import AdaptiveRule
from .apgd import APGDRule
from .budget import enforce_budget
from .catalogue import AttackSpec, find_attack
from .fab import FABRule
from .folding import N_PROBES, find_folds, folded
from .judge import CountedModel, judge, logits, misclassified, under_attack, variants_set
from .pgd import CosineRule, PGDRule
from .problem import AttackResult, Problem
from .queue import AttackTask, Rule, SearchOutcome, search
from .square import SquareRule

SEARCHES: dict[str, Callable[..., Rule]] = {
    "apgd-ce": partial(APGDRule, loss="ce"),
    "apgd-dlr": partial(APGDRule, loss="dlr"),
    "apgd-t": partial(APGDRule, loss="dlr-targeted"),
    "apgd-margin": partial(APGDRule, loss="margin"),
    "apgd-margin-t": partial(APGDRule, loss="margin-targeted"),
    "apgd-probability": partial(APGDRule, loss="probability"),
    "apgd-probability-t": partial(APGDRule, loss="probability-targeted"),
    "cosine-margin": partial(CosineRule, loss="margin"),
    "cosine-probability": partial(CosineRule, loss="probability"),
    "fab-t": FABRule,
    "square": SquareRule,
    "pgd": PGDRule,
    "adaptive": AdaptiveRule,
}
"""Family -> what makes its rule of a ``Problem`` and the options of the ``AttackSpec``."""


def run_attack(
    name: str,
    problem: Problem,
    examples: Examples,
    alphas: Tensor | None = None,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> AttackResult:
    """Attack n examples, on any device, and judge each break afresh; images returned are exactly inside the budget.

    ``alphas``: a variant of ``problem.model``, (n_sites,), or one for each example, (n, n_sites), so that one batch
    serves many; None: the model as it stands. An example has the same start whatever its variant, and the same result
    whatever the batch size, the order, and the other examples, as far as the model's own outputs do. Examples
    misclassified at the clean image are broken as they are, for one forward pass. ``on_progress`` is called with the
    number of examples finished since its last call. Where the memory of a GPU ends, the attack begins anew with half
    the batch, which this model keeps from then on.

    Raises ``ConfigError`` (unknown attack), ``DataError`` (images or labels of the wrong kind), ``AttackError`` (the
    model's outputs are not (n, n_classes) finite logits) and ``torch.OutOfMemoryError`` (one image is too large).
    """
    spec, examples = find_attack(name), _checked(examples, problem.n_classes)
    told = _Told(on_progress or (lambda n_examples: None))
    return halving(problem.model, problem.batch_size, partial(_attack, spec, problem, examples, alphas, told))


@dataclass
class _Told:
    """Progress that is told once, however often a search has to begin anew."""

    tell: Callable[[int], None]
    n_done: int = 0
    n_told: int = 0

    def advance(self, n_examples: int) -> None:
        self.n_done += n_examples
        if self.n_done > self.n_told:
            self.tell(self.n_done - self.n_told)
            self.n_told = self.n_done


@torch.inference_mode(False)
def _attack(
    spec: AttackSpec, problem: Problem, examples: Examples, alphas: Tensor | None, told: _Told, batch_size: int
) -> AttackResult:
    started, told.n_done = time.perf_counter(), 0
    problem = replace(problem, batch_size=batch_size)
    run = _Run(spec, problem, examples, told.advance)
    with under_attack(problem.model):
        for rows, variants in _parts(problem, alphas, examples.x):
            with variants_set(problem.model, variants) as each:
                rows, task = run.classify(rows, each)
                # An example leaves the search at its first break. Where that break was one of low precision alone
                # (autocast, TF32), stopping there would flatter the model: it is searched again in full precision.
                for form in (run.fast_form, run.exact_form):
                    if len(rows):
                        with form(task) as searched:
                            outcome = search(searched, SEARCHES[spec.search](problem, **dict(spec.options)))
                        left = run.judge(rows, searched, outcome)
                        rows, task = rows[left], task.at(left)
    seconds = time.perf_counter() - started
    return AttackResult(run.adversarial, run.broken, run.passes, run.rejected, seconds, run.n_in_vain)


def _parts(problem: Problem, alphas: Tensor | None, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Rows of n images to search together: under one variant (n_sites,), or in one batch with a variant each."""
    every = torch.arange(len(x), device=x.device)
    if alphas is None or alphas.ndim == 1:
        return [(every, alphas)]
    if problem.search_model in (None, problem.model) and bool((alphas != alphas[:1]).any()):
        return [(every, alphas)]
    # another form of the model cannot take an alpha a row, and one variant needs none
    return [(every[(alphas == variant).all(dim=1).to(x.device)], variant) for variant in alphas.unique(dim=0)]


class _Run:
    def __init__(self, spec: AttackSpec, problem: Problem, examples: Examples, advance: Callable[[int], None]) -> None:
        self.spec, self.problem, self.examples, self.advance = spec, problem, examples, advance
        n, device = len(examples), examples.x.device
        self.adversarial = examples.x.clone()
        self.broken = torch.zeros(n, dtype=torch.bool, device=device)
        self.passes = torch.zeros(n, 2, dtype=torch.int64)
        self.rejected = torch.zeros(n, dtype=torch.int64)
        self.n_in_vain = 0
        self.device = problem.device(device)

    def classify(self, rows: Tensor, alphas: Tensor | None) -> tuple[Tensor, AttackTask]:
        """Show the model the clean images at ``rows`` (m,); those that it classifies correctly, to be searched."""
        examples = self.examples.at(rows)
        clean_logits = logits(self.problem, examples.x, alphas)
        wrong = misclassified(clean_logits, examples.y)
        self.broken[rows] = wrong
        self.passes[rows.cpu(), 0] += 1
        if wrong.any():
            self.advance(int(wrong.sum()))
        task = AttackTask(
            self.spec.start, self._counted(self.problem.model), self.problem, examples, clean_logits, alphas
        )
        return rows[~wrong], task.at(~wrong)

    def judge(self, rows: Tensor, task: AttackTask, outcome: SearchOutcome) -> Tensor:
        """Note what a search of the examples at ``rows`` (m,) came to; (m,) bool: the breaks that are none."""
        claimed = outcome.claimed.to(rows.device)
        self.passes[rows.cpu()] += outcome.passes
        self.n_in_vain += task.model.backward_passes - int(outcome.passes[:, 1].sum())
        self.passes[rows[claimed].cpu(), 0] += 1
        given = task.at(claimed)
        points = enforce_budget(outcome.points.to(rows.device)[claimed], given.examples.x, self.problem.budget)
        confirmed = judge(self.problem, points, given.examples.y, given.alphas)
        self.adversarial[rows[claimed][confirmed]] = points[confirmed]
        self.broken[rows[claimed][confirmed]] = True
        self.rejected[rows[claimed][~confirmed].cpu()] += 1
        left = claimed.clone()
        left[claimed] = ~confirmed
        return left

    @contextmanager
    def fast_form(self, task: AttackTask) -> Iterator[AttackTask]:
        """On the model as it is searched: in the problem's precision, batch norms folded."""
        # a compiled form may not call hooks
        given = None if self.spec.has_hooks else self.problem.search_model
        model = self.problem.model if given is None else given
        folds = []
        # a compiled one would be compiled once more in its folded form
        if not hasattr(model, "_orig_mod") and getattr(model, "may_fold", True):
            folds = find_folds(model, task.examples.x[:N_PROBES].to(self.device).contiguous())
        with search_precision(self.device, self.problem.precision), folded(folds), self._backward_rule():
            yield replace(task, model=self._counted(model), advance=self.advance)

    @contextmanager
    def exact_form(self, task: AttackTask) -> Iterator[AttackTask]:
        """On the model as it is judged; of these examples progress has been told."""
        with full_float32(self.device), self._backward_rule():
            yield task

    def _backward_rule(self) -> AbstractContextManager[None]:
        return backward_rule(self.problem.model, "true" if self.spec.backward == "base" else self.spec.backward)

    def _counted(self, model: nn.Module) -> CountedModel:
        return CountedModel(model, self.problem.n_classes, self.device, self.spec.backward == "base")


def _checked(examples: Examples, n_classes: int) -> Examples:
    """The examples as attacks take them: detached, classes and indices int64, classes beside the images."""
    x, y, indices = examples.x.detach().contiguous(), examples.y, examples.indices
    n = x.shape[0]
    if x.ndim != 4 or x.dtype != torch.float32 or y.shape != (n,) or indices.shape != (n,):
        raise DataError(
            f"got images {x.dtype} {tuple(x.shape)}, labels {tuple(y.shape)}, indices {tuple(indices.shape)}; expected "
            "float32 (n, channels, height, width), (n,) and (n,)"
        )
    if n and not (x.min() >= 0 and x.max() <= 1):  # false for NaN as well
        raise DataError(f"pixels go from {x.min().item():g} to {x.max().item():g}, expected [0, 1]")
    if n and (y.min() < 0 or y.max() >= n_classes):
        raise DataError(f"labels go from {int(y.min())} to {int(y.max())}, the model has {n_classes} classes")
    return Examples(x, y.to(x.device, torch.int64), indices.to("cpu", torch.int64))
