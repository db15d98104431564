"""``meansparse evaluate``: base and sparsified model under the same attacks on the same examples.

The clean images first, then each attack, the plain ones before BPDA. An attack is tried on the examples that the ones
before it have left of the same model, or, with ``individual``, on every example that is right at its clean image.
Every image that an attack found on one model is tried on the other as well, and a pool of images from elsewhere on both
(``transfer``), so that neither meets a weaker adversary. What an earlier session kept is judged again once read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..attacks.problem import Problem
from ..data.examples import Examples
from ..errors import ConfigError, DataError
from .cells import Cells, FoundImages
from .comparison import Evaluation
from .outcomes import CLEAN, MODELS, TRANSFER, ModelName, ModelOutcomes, Spent, attack_version, run_order
from .state import Chunk, EvaluationState, StateFolder, chunk_of

__all__ = ["Plan", "Evaluation", "EvaluationProgress", "EvaluationRun", "search_form"]


@dataclass(frozen=True)
class Plan:
    """``attacks``: their names. ``alpha``: of the sparsified model; the base is the same model at alpha = 0.

    ``individual``: each attack is tried on every example that is right at its clean image, which gives each a number of
    its own and costs several times as much.
    """

    attacks: tuple[str, ...]
    alpha: float
    individual: bool = False


@dataclass(frozen=True)
class EvaluationProgress:
    """``attack`` (or ``clean``) on ``model`` is done with ``n_done`` of ``n_total`` examples.

    ``n_resumed`` of these were done by an earlier session. ``n_robust``: model -> finished attack -> examples still
    right after it and all before it, of ``n_examples``.
    """

    model: ModelName
    attack: str
    n_done: int
    n_total: int
    n_resumed: int
    n_examples: int
    n_robust: dict[ModelName, dict[str, int]] = field(default_factory=dict)


Finder = tuple[ModelName, str]
"""Whose images: of which attack, on which model."""


@dataclass
class _Known:
    """What is known of one of the two models; every mask is (n,) bool, ``variant`` (n_sites,).

    ``transferred``: an image from elsewhere breaks it. ``breaking``: finder -> its chunks, each with the rows whose
    images break this model. ``broken_by_pool``: where from, and the images of a pool that break it.
    """

    variant: Tensor
    right: Tensor
    transferred: Tensor
    is_classified: bool = False
    faced: dict[str, Tensor] = field(default_factory=dict)
    broken: dict[str, Tensor] = field(default_factory=dict)
    spent: dict[str, Spent] = field(default_factory=dict)
    n_transfer_passes: int = 0
    breaking: dict[Finder, list[tuple[str, Tensor]]] = field(default_factory=dict)
    broken_by_pool: list[tuple[str, FoundImages]] = field(default_factory=list)

    def left_by(self, attacks: Iterable[str]) -> Tensor:
        """Right at the clean image and under each of ``attacks``, as far as they were tried on it."""
        left = self.right.clone()
        for attack in attacks:
            left &= ~self.broken[attack]
        return left


class EvaluationRun:
    """n ``examples`` on both models of ``problem``, whose ``batch_size`` is also what a kill can cost.

    Finished chunks are read back from ``folder``; killed at any moment and run again, the outcomes are the same. More
    examples or a further attack add to what is there; batch size, device and form of the search may change.
    ``smaller``: the same evaluation at a smaller eps; what an attack broke there it has broken here, by the same image.
    It is not attacked again once both models have fallen: until then one model's images at this eps are still to be
    tried on the other.

    Raises ``ArtifactError`` where the folder belongs to other settings or examples, ``ConfigError``, ``DataError`` and
    ``AttackError`` as ``run_attack`` does.
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
        self.cells, self.smaller = Cells(problem, examples), smaller
        key = {
            "norm": problem.budget.norm,
            "eps": problem.budget.eps,
            "seed": problem.seed,
            "precision": problem.precision,
            "alpha": plan.alpha,
        }
        self.state = EvaluationState(folder, key, {name: attack_version(name) for name in sorted(self.order)}, examples)
        alphas: dict[ModelName, float] = {"base": 0.0, "sparsified": plan.alpha}
        names = MODELS if plan.alpha else MODELS[:1]  # at alpha = 0 the two models are one
        blank, everywhere = self.cells.blank, self.cells.everywhere
        self.models = {name: _Known(everywhere(alphas[name]), blank(), blank()) for name in names}
        self.both_fell = blank()
        if smaller is not None:
            same = torch.equal(smaller.cells.examples.indices, self.cells.examples.indices)
            if not same or smaller.plan.alpha != plan.alpha:
                raise ConfigError("the evaluation at a smaller eps is of other examples, or of another alpha")
            self.both_fell = ~torch.stack([smaller.robust(name) for name in names]).any(dim=0)

    def attack(self) -> Evaluation:
        """Every attack on both models."""
        for name in self.models:
            self._classify_clean(name)
        for attack in self.order:
            for name in self.models:
                self._attack(name, attack)
        return self.evaluation()

    def try_pool(self, pool: Mapping[str, FoundImages]) -> Evaluation:
        """Try images from elsewhere on both models; where from -> images. No attack's own number depends on them."""
        for source, found in pool.items():
            admitted = self.cells.admitted(found)
            for known in self.models.values():
                known.broken_by_pool.append((source, admitted.at(self._try(known, admitted))))
        return self.evaluation()

    def evaluation(self) -> Evaluation:
        """What is known by now."""
        examples, alpha = self.cells.examples, self.plan.alpha
        base = self._outcomes("base")
        nothing_spent = dict.fromkeys(base.spent, Spent())
        sparsified = self._outcomes("sparsified") if alpha else replace(base, spent=nothing_spent)
        return Evaluation(alpha, self.order, examples.indices.numpy(), examples.y.cpu().numpy(), base, sparsified)

    def robust(self, name: ModelName) -> Tensor:
        """(n,) bool: right at the clean image, under every attack and under every image from elsewhere."""
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
        faced = known.faced | {TRANSFER: known.right}
        broken = known.broken | {TRANSFER: self._transferred(name) & known.right}
        return ModelOutcomes(
            known.right.numpy(),
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
            wrong[rows] = ~self.cells.right(rows, known.variant)
            passes, none = torch.tensor([[1, 0]]).repeat(len(rows), 1), torch.zeros_like(rows)
            self.state.append(name, CLEAN, Chunk(rows, wrong[rows], passes, none))
            tell(len(rows))
        known.right, known.is_classified = ~wrong, True
        tell(0)

    def _attack(self, name: ModelName, attack: str) -> None:
        """One attack on one model: the examples that it was not tried on yet are attacked."""
        known = self.models[name]
        wanted = known.right.clone() if self.plan.individual else known.left_by(known.broken)
        at_smaller = None if self.smaller is None else self.smaller.models[name].broken.get(attack)
        broken_before = self.cells.blank() if at_smaller is None else at_smaller & wanted
        attempted, broken, spent = broken_before & self.both_fell, broken_before, Spent()
        for file, chunk in self.state.chunks(name, attack):
            attempted[chunk.positions] = True
            spent += self._add((name, attack), file, chunk, wanted, broken, is_judged=False)
        tell = self._teller(name, attack, int(wanted.sum()), int((wanted & attempted).sum()))
        for rows in self._parts(wanted & ~attempted):
            chunk = chunk_of(rows, self.cells.attack(attack, rows, known.variant, tell))
            file = self.state.append(name, attack, chunk)
            spent += self._add((name, attack), file, chunk, wanted, broken, is_judged=True)
        known.faced[attack], known.broken[attack], known.spent[attack] = wanted, broken, spent
        tell(0)

    def _add(self, by: Finder, file: str, chunk: Chunk, wanted: Tensor, broken: Tensor, *, is_judged: bool) -> Spent:
        """Mark in ``broken`` the ``wanted`` examples whose break holds; try their images on the other model as well."""
        found = self.cells.inside(chunk.found(wanted[chunk.positions]))  # what is outside is not shown to a model
        confirmed = found.rows if is_judged else found.rows[self.cells.breaks(found, self.models[by[0]].variant)]
        broken[confirmed] = True
        for name, known in self.models.items():
            rows = confirmed if name == by[0] else found.rows[self._try(known, found)]
            known.breaking.setdefault(by, []).append((file, rows))
        return _spent(chunk, wanted, confirmed)

    def _try(self, known: _Known, found: FoundImages) -> Tensor:
        """(m,) bool: which of m images from elsewhere break a model; each costs it a forward pass."""
        breaks = self.cells.breaks(found, known.variant)
        known.transferred[found.rows[breaks]] = True
        known.n_transfer_passes += len(found)
        return breaks

    def _parts(self, mask: Tensor) -> list[Tensor]:
        """Rows where ``mask`` (n,) is true, in order, ``batch_size`` at a time."""
        rows = mask.nonzero().flatten()
        return list(rows.split(self.cells.problem.batch_size)) if len(rows) else []

    def _teller(self, name: ModelName, attack: str, n_total: int, n_resumed: int) -> Callable[[int], None]:
        """What is told of progress: called with the number of examples done since."""
        n_done = n_resumed

        def tell(n_more: int) -> None:
            nonlocal n_done
            n_done += n_more
            if self.on_update is not None:
                n_robust = {model: _n_robust(known) for model, known in self.models.items()}
                self.on_update(EvaluationProgress(name, attack, n_done, n_total, n_resumed, len(self.cells), n_robust))

        tell(0)
        return tell


def _n_robust(known: _Known) -> dict[str, int]:
    """Finished attack -> examples still right after it and all before it, from the clean images on."""
    names = list(known.broken)
    done = (CLEAN, *names) if known.is_classified else ()
    return {name: int(known.left_by(names[:k]).sum()) for k, name in enumerate(done)}


def _spent(chunk: Chunk, wanted: Tensor, confirmed: Tensor) -> Spent:
    """The cost of a chunk of which the breaks at ``confirmed`` count; what is not ``wanted`` has no part in it."""
    counts = wanted[chunk.positions]
    claimed = chunk.broken & counts
    forward, backward = chunk.passes[counts].sum(dim=0).tolist()
    forward_broken, backward_broken = chunk.passes[claimed].sum(dim=0).tolist()
    return Spent(
        forward_passes=forward,
        backward_passes=backward,
        seconds=chunk.seconds,
        rejected=int(chunk.rejected[counts].sum()),
        unconfirmed=int(claimed.sum()) - len(confirmed),
        n_attacked=int(counts.sum()),
        n_attacked_broken=int(claimed.sum()),
        forward_passes_broken=forward_broken,
        backward_passes_broken=backward_broken,
    )


def search_form(model: nn.Module, *, compile: bool, channels_last: bool) -> nn.Module | None:
    """The model in the form that is searched, its values up to rounding; None: the model itself is searched.

    In channels-last its convolution weights are laid out anew, in place: their values stay, so the judge may use them.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cast(nn.Module, torch.compile(model)) if compile else None
