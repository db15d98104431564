"""``meansparse evaluate``: base and sparsified model under the same attacks on the same examples.

The clean images first, then each attack, the plain ones before BPDA. An attack is tried on the examples that the ones
before it have left of the same model, or, with ``individual``, on every example that is correct at its clean image.
Every image that an attack found on one model is tried on the other as well, and a pool of images from elsewhere on both
(``transfer``), so that neither meets a weaker adversary. What an earlier session kept is judged again once read.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..attacks.problem import Problem
from ..attacks.runner import run_attack
from ..data.examples import Examples
from ..errors import ConfigError, DataError
from .cells import Cells, FoundImages
from .comparison import Evaluation
from .outcomes import CLEAN, TRANSFER, ModelName, ModelOutcomes, Spent, each_model, run_order, twin_on_base
from .state import Chunk, EvaluationState, StateFolder, chunk_of


@dataclass(frozen=True)
class Plan:
    """``individual``: each attack is tried on every example that is correct at its clean image, at a higher cost.

    ``finish``: what is not on disk is done, not noted as ``missing``.
    """

    attacks: tuple[str, ...]
    alpha: float
    individual: bool = False
    finish: bool = True


@dataclass(frozen=True)
class EvaluationProgress:
    """``attack`` (or ``clean``) on ``model`` is done with ``n_done`` of ``n_total`` examples.

    ``n_resumed`` of these were done by an earlier session. ``n_robust``: model -> finished attack -> examples still
    correct after it and all before it, of ``n_examples``.
    """

    model: ModelName
    attack: str
    n_done: int
    n_total: int
    n_resumed: int
    n_examples: int
    n_robust: dict[ModelName, dict[str, int]] = field(default_factory=dict)


Finder = tuple[ModelName, str]
"""A search that found images: the model it was on, and the attack."""


@dataclass
class _Known:
    """The outcomes so far of one of the two models; every mask is (n,) bool, ``variant`` (n_sites,).

    ``transferred``: an image from elsewhere breaks it. ``breaking``: finder -> its chunks, each with the rows whose
    images break this model. ``broken_by_pool``: where from, and the images of a pool that break it.
    """

    variant: Tensor
    correct: Tensor
    transferred: Tensor
    is_classified: bool = False
    faced: dict[str, Tensor] = field(default_factory=dict)
    broken: dict[str, Tensor] = field(default_factory=dict)
    spent: dict[str, Spent] = field(default_factory=dict)
    n_transfer_passes: int = 0
    breaking: dict[Finder, list[tuple[str, Tensor]]] = field(default_factory=dict)
    broken_by_pool: list[tuple[str, FoundImages]] = field(default_factory=list)

    def left_by(self, attacks: Iterable[str]) -> Tensor:
        """Correct at the clean image and under each of ``attacks``, as far as they were tried on it."""
        left = self.correct.clone()
        for attack in attacks:
            left &= ~self.broken[attack]
        return left

    def n_robust(self) -> dict[str, int]:
        """Finished attack -> examples still correct after it and all before it, from the clean images on."""
        names = list(self.broken)
        done = (CLEAN, *names) if self.is_classified else ()
        return {name: int(self.left_by(names[:k]).sum()) for k, name in enumerate(done)}


@dataclass
class _Turn:
    """An attack on a model: the examples that face it, were attacked, were broken; masks (n,) bool."""

    by: Finder
    wanted: Tensor
    attempted: Tensor
    broken: Tensor
    spent: Spent = Spent()


class EvaluationRun:
    """n ``examples`` on both models of ``problem``, whose ``batch_size`` is also what a kill can cost.

    What ``folder`` has is read back; more examples or a further attack add to it, batch size, device and form of the
    search may change. ``smaller``: the same evaluation at a smaller eps; what an attack broke there it has broken here,
    by the same image. It is not attacked again once both models have fallen: until then one model's images at this eps
    are still to be tried on the other. Raises ``ArtifactError`` where the folder is of other settings or examples.
    """

    def __init__(
        self,
        problem: Problem,
        examples: Examples,
        plan: Plan,
        folder: StateFolder,
        *,
        smaller: "EvaluationRun | None" = None,
        on_update: Callable[[EvaluationProgress], None] | None = None,
    ) -> None:
        if not len(examples.x) == len(examples.y) == len(examples.indices):
            n, m, k = len(examples.x), len(examples.y), len(examples.indices)
            raise DataError(f"got {n} images, {m} labels and {k} indices")
        if not len(examples):
            raise ConfigError("n_examples = 0 must be 1 or above")
        self.plan, self.order, self.on_update = plan, run_order(plan.attacks), on_update
        self.is_random = getattr(problem.model, "n_draws", 1) > 1  # whose draws would not be those that found an image
        self.cells, self.smaller = Cells(problem, examples), smaller
        key = {
            "norm": problem.budget.norm,
            "eps": problem.budget.eps,
            "seed": problem.seed,
            "precision": problem.precision,
            "alpha": plan.alpha,
        }
        self.state = EvaluationState(folder, key, sorted(self.order), examples)
        alphas, blank = each_model(plan.alpha), self.cells.blank
        self.models = {name: _Known(self.cells.everywhere(a), blank(), blank()) for name, a in alphas.items()}
        self.both_fell, self.missing = blank(), blank()
        if smaller is not None:
            same = torch.equal(smaller.cells.examples.indices, self.cells.examples.indices)
            if not same or smaller.plan.alpha != plan.alpha:
                raise ConfigError("the evaluation at a smaller eps is of other examples, or of another alpha")
            self.both_fell = ~torch.stack([smaller.robust(name) for name in alphas]).any(dim=0)

    def attack(self) -> Evaluation:
        """Every attack on both models: the examples that it has not faced yet are attacked."""
        for name in self.models:
            self._classify_clean(name)
        for attack, name in itertools.product(self.order, self.models):
            known, turn = self.models[name], self._taken_up(name, attack)
            tell = self._teller(name, attack, int(turn.wanted.sum()), int((turn.wanted & turn.attempted).sum()))
            for rows in self._parts(turn.wanted & ~turn.attempted):
                result = run_attack(attack, self.cells.problem, self.cells.at(rows), known.variant, on_progress=tell)
                chunk = chunk_of(rows, result)
                self._add(turn, self.state.append(name, attack, chunk), chunk, is_judged=True)
            known.faced[attack], known.broken[attack], known.spent[attack] = turn.wanted, turn.broken, turn.spent
            tell(0)
        return self.evaluation()

    def try_pool(self, pool: Mapping[str, FoundImages]) -> Evaluation:
        """Try images from elsewhere on both models; where from -> images. No attack's own number depends on them."""
        for source, found in pool.items():
            admitted = self.cells.admitted(found)
            for known in self.models.values():
                known.broken_by_pool.append((source, admitted.at(self._try(known, admitted))))
        return self.evaluation()

    def evaluation(self) -> Evaluation:
        examples, alpha = self.cells.examples, self.plan.alpha
        base = self._outcomes("base")
        nothing_spent = dict.fromkeys(base.spent, Spent())
        sparsified = self._outcomes("sparsified") if alpha else replace(base, spent=nothing_spent)
        return Evaluation(alpha, self.order, examples.indices.numpy(), examples.y.cpu().numpy(), base, sparsified)

    def robust(self, name: ModelName) -> Tensor:
        """(n,) bool: correct at the clean image, under every attack and under every image from elsewhere."""
        return self.models[name].left_by(self.order) & ~self._transferred(name)

    def found_on(self, name: ModelName, by: Finder) -> Iterator[FoundImages]:
        """The images of ``by`` that break ``name``, read back chunk by chunk."""
        breaking = dict(self.models[name].breaking.get(by, []))
        for file, chunk in self.state.chunks(*by) if breaking else ():
            found = chunk.found(torch.ones_like(chunk.broken))
            yield found.at(torch.isin(found.rows, breaking.get(file, found.rows[:0])))

    def _transferred(self, name: ModelName) -> Tensor:
        """(n,) bool: broken by an image from elsewhere, at this eps or at a smaller one."""
        mask = self.models[name].transferred
        return mask if self.smaller is None else mask | self.smaller._transferred(name)

    def _outcomes(self, name: ModelName) -> ModelOutcomes:
        """Everything about one model, with ``transfer`` as the last attack."""
        known = self.models[name]
        faced = known.faced | {TRANSFER: known.correct}
        broken = known.broken | {TRANSFER: self._transferred(name) & known.correct}
        return ModelOutcomes(
            known.correct.numpy(),
            {attack: mask.numpy() for attack, mask in faced.items()},
            {attack: mask.numpy() for attack, mask in broken.items()},
            known.spent | {TRANSFER: Spent(forward_passes=known.n_transfer_passes)},
        )

    def _classify_clean(self, name: ModelName) -> None:
        """One forward pass for each example that has not had one."""
        known, attempted, wrong = self.models[name], self.cells.blank(), self.cells.blank()
        for _, chunk in self.state.chunks(name, CLEAN):
            attempted[chunk.positions], wrong[chunk.positions] = True, chunk.broken
        tell = self._teller(name, CLEAN, len(self.cells), int(attempted.sum()))
        for rows in self._parts(~attempted):
            wrong[rows] = ~self.cells.correct(rows, known.variant)
            passes, none = torch.tensor([[1, 0]]).repeat(len(rows), 1), torch.zeros_like(rows)
            self.state.append(name, CLEAN, Chunk(rows, wrong[rows], passes, none))
            tell(len(rows))
        known.correct, known.is_classified = ~wrong, True
        tell(0)

    def _taken_up(self, name: ModelName, attack: str) -> _Turn:
        """An attack on one model, as far as it was done at a smaller eps or by an earlier session."""
        known = self.models[name]
        wanted = known.correct.clone() if self.plan.individual else known.left_by(known.broken)
        at_smaller = None if self.smaller is None else self.smaller.models[name].broken.get(attack)
        broken = self.cells.blank() if at_smaller is None else at_smaller & wanted
        turn = _Turn((name, attack), wanted, broken & self.both_fell, broken)
        twin = twin_on_base(attack) if name == "base" else ""
        if twin in known.broken:  # without operators another backward rule is the same attack, from the same start
            turn.broken, turn.attempted = turn.broken | (known.broken[twin] & wanted), turn.attempted | wanted
        for file, chunk in self.state.chunks(name, attack):
            turn.attempted[chunk.positions] = True
            self._add(turn, file, chunk, is_judged=self.is_random)
        return turn

    def _add(self, turn: _Turn, file: str, chunk: Chunk, *, is_judged: bool) -> None:
        """Mark as broken the examples whose break holds; try their images on the other model as well."""
        # what is outside the budget is not shown to a model
        found = self.cells.inside(chunk.found(turn.wanted[chunk.positions]))
        by = self.models[turn.by[0]]
        confirmed = found.rows if is_judged else found.rows[self.cells.breaks(found, by.variant)]
        turn.broken[confirmed] = True
        turn.spent += chunk.spent(turn.wanted, confirmed)
        for known in self.models.values():
            rows = confirmed if known is by else found.rows[self._try(known, found)]
            known.breaking.setdefault(turn.by, []).append((file, rows))

    def _try(self, known: _Known, found: FoundImages) -> Tensor:
        """(m,) bool: which of m images from elsewhere break a model; each costs it a forward pass."""
        breaks = self.cells.breaks(found, known.variant)
        known.transferred[found.rows[breaks]] = True
        known.n_transfer_passes += len(found)
        return breaks

    def _parts(self, mask: Tensor) -> list[Tensor]:
        """Rows where ``mask`` (n,) is true, in order, ``batch_size`` at a time."""
        if not self.plan.finish:
            self.missing |= mask
            return []
        rows = mask.nonzero().flatten()
        return list(rows.split(self.cells.problem.batch_size)) if len(rows) else []

    def _teller(self, name: ModelName, attack: str, n_total: int, n_resumed: int) -> Callable[[int], None]:
        """Tells of progress; called with the number of examples done since."""
        n_done = n_resumed

        def tell(n_more: int) -> None:
            nonlocal n_done
            n_done += n_more
            if self.on_update is not None:
                n_robust = {model: known.n_robust() for model, known in self.models.items()}
                self.on_update(EvaluationProgress(name, attack, n_done, n_total, n_resumed, len(self.cells), n_robust))

        tell(0)
        return tell
