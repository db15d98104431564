"""``run_attack``: one attack on n examples, from the clean images to judged results."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..data.examples import Examples
from ..errors import DataError
from ..operator.active import alpha_set, backward_rule
from ..operator.device import full_float32
from ..operator.insertion import SparsifiedModel
from .adaptive import adaptive
from .apgd import apgd
from .budget import enforce_budget
from .catalogue import AttackSpec, find_attack
from .counting import CountedModel
from .fab import fab
from .folding import N_PROBES, find_folds, folded
from .judge import judge, logits, misclassified, under_attack
from .pgd import pgd
from .precision import search_precision
from .problem import Problem
from .result import AttackResult
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
    problem: Problem,
    examples: Examples,
    alphas: Tensor | None = None,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> AttackResult:
    """Attack n examples and judge every break afresh.

    The images may be on another device than the model. ``alphas`` (n, n_sites) gives each example a variant of
    ``problem.model``, a ``SparsifiedModel``: an alpha for each site, so that one batch serves many variants; None: the
    model as it stands. An example starts at the same point whatever its variant. Examples misclassified at the clean
    image are broken as they are and cost one forward pass. ``on_progress`` is called with the number of examples
    finished since its last call; over a run these add up to n.

    Returns adversarial images inside the budget and [0, 1], exactly, on the device of the examples. An example counts
    as broken only if the returned image is misclassified in a forward pass of its own: float32, evaluation mode. An
    example has the same result whatever the batch size, the order, and the other examples, as far as the model's own
    outputs do.

    Raises ``ConfigError`` (unknown attack), ``DataError`` (images or labels of the wrong kind) and ``AttackError`` (the
    model's outputs are not (n, n_classes) finite logits).
    """
    started = time.perf_counter()
    spec, examples = find_attack(name), _checked(examples, problem.n_classes)
    run = _Run(spec, problem, examples, on_progress or _no_progress)
    every = torch.arange(len(examples), device=examples.x.device)
    with under_attack(problem.model):
        if alphas is None:
            run.attack(every)
        elif problem.search_model in (None, problem.model) and bool((alphas != alphas[:1]).any()):
            run.attack(every, alphas)
        else:  # another form of the model cannot take an alpha a row, and one variant needs none
            for variant in alphas.unique(dim=0):
                rows = (alphas == variant).all(dim=1).to(every.device)
                with alpha_set(cast(SparsifiedModel, problem.model), variant):
                    run.attack(every[rows])
    seconds = time.perf_counter() - started
    return AttackResult(run.adversarial, run.broken, run.passes, run.rejected, seconds, run.n_in_vain)


class _Run:
    """The result as far as it is known; ``attack`` fills in the examples at some rows."""

    def __init__(self, spec: AttackSpec, problem: Problem, examples: Examples, advance: Callable[[int], None]) -> None:
        self.spec, self.problem, self.examples, self.advance = spec, problem, examples, advance
        n, device = len(examples), examples.x.device
        self.adversarial = examples.x.clone(memory_format=torch.contiguous_format)
        self.broken = torch.zeros(n, dtype=torch.bool, device=device)
        self.passes = torch.zeros(n, 2, dtype=torch.int64)
        self.rejected = torch.zeros(n, dtype=torch.int64)
        self.n_in_vain = 0
        self.device = problem.device(device)

    def attack(self, rows: Tensor, alphas: Tensor | None = None) -> None:
        """Attack the examples at ``rows`` (m,), each at its row of ``alphas`` (m, n_sites)."""
        examples = self.examples.at(rows)
        clean_logits = logits(self.problem, examples.x, alphas)
        wrong = misclassified(clean_logits, examples.y)
        self.broken[rows] = wrong
        self.passes[rows.cpu(), 0] += 1
        if wrong.any():
            self.advance(int(wrong.sum()))
        left = (~wrong).nonzero().squeeze(1)
        backward = "true" if self.spec.backward == "base" else self.spec.backward
        # An example leaves the search at its first break. Where that break was one of low precision alone (autocast,
        # TF32), stopping there would flatter the model: those examples are searched once more, in full precision.
        for form, advance in ((self._fast_form, self.advance), (self._exact_form, _no_progress)):
            if len(left) == 0:
                break
            some = examples.at(left)
            with form(some) as searched, backward_rule(self.problem.model, backward):
                task = AttackTask(
                    self.spec.start,
                    searched,
                    self.problem,
                    Examples(some.x.contiguous(), some.y, some.indices),
                    clean_logits[left],
                    None if alphas is None else alphas[left.to(alphas.device)],
                    advance,
                )
                outcome = SEARCHES[self.spec.search](task, **dict(self.spec.options))
            left = left[~self._judge(rows[left], task, outcome)]

    def _judge(self, rows: Tensor, task: AttackTask, outcome: SearchOutcome) -> Tensor:
        """Note what a search of the examples at ``rows`` (m,) came to; (m,) bool: all but the breaks that are none."""
        claimed = outcome.claimed.to(rows.device)
        self.passes[rows.cpu()] += outcome.passes
        self.n_in_vain += task.model.backward_passes - int(outcome.passes[:, 1].sum())
        self.passes[rows[claimed].cpu(), 0] += 1
        given = task.examples.at(claimed)
        points = enforce_budget(outcome.points.to(rows.device)[claimed], given.x, self.problem.budget)
        alphas = None if task.alphas is None else task.alphas[claimed.to(task.alphas.device)]
        confirmed = judge(self.problem, points, given.y, alphas)
        self.adversarial[rows[claimed][confirmed]] = points[confirmed]
        self.broken[rows[claimed][confirmed]] = True
        self.rejected[rows[claimed][~confirmed].cpu()] += 1
        settled = ~claimed
        settled[claimed] = confirmed
        return settled

    @contextmanager
    def _fast_form(self, examples: Examples) -> Iterator[CountedModel]:
        """The model as it is searched: in the problem's precision, batch norms folded."""
        # penalised attacks put hooks on the operators, which a compiled form may not call
        given = None if self.spec.search == "adaptive" else self.problem.search_model
        model = self.problem.model if given is None else given
        folds = []
        if not hasattr(model, "_orig_mod"):  # compiled: it would be once more in its folded form
            folds = find_folds(model, examples.x[:N_PROBES].to(self.device).contiguous())
        with search_precision(self.device, self.problem.precision), folded(folds):
            yield self._counted(model)

    @contextmanager
    def _exact_form(self, examples: Examples) -> Iterator[CountedModel]:
        """The model as it is judged."""
        with full_float32(self.device):
            yield self._counted(self.problem.model)

    def _counted(self, model: torch.nn.Module) -> CountedModel:
        is_base_gradient = self.spec.backward == "base"
        return CountedModel(model, n_classes=self.problem.n_classes, device=self.device, base_gradient=is_base_gradient)


def _no_progress(n_examples: int) -> None:
    """Where nobody listens, or the examples have been counted already."""


def _checked(examples: Examples, n_classes: int) -> Examples:
    """The examples as attacks take them: detached, classes and indices int64, classes beside the images."""
    x, y, indices = examples.x.detach(), examples.y, examples.indices
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
