"""``meansparse evaluate``: base and sparsified model under the same attacks on the same examples.

The clean images first, then each attack, the plain ones before BPDA. An attack faces the examples that the ones before it
have left of the same model, or, with ``individual``, every example that is right at its clean image. Each break is
judged afresh at once, before the next attack is told what is left. Every image that an attack found on one model is
tried on the other as well, and a pool of images from elsewhere on both (``transfer``), so that neither faces a weaker
adversary.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..attacks import expand_attacks, run_attack
from ..attacks.budget import within_budget
from ..attacks.judge import judge, under_attack
from ..attacks.precision import Precision
from ..attacks.problem import Problem
from ..attacks.result import Budget, Norm
from ..data.examples import Examples
from ..errors import ConfigError, DataError
from ..operator.active import alpha_set
from ..operator.insertion import SparsifiedModel
from ..settings.shard import Shard
from .evaluation import CLEAN, MODELS, TRANSFER, Evaluation, ModelName, ModelOutcomes, Spent, attack_version, run_order
from .pool import admissible
from .state import Chunk, EvaluationState, chunk_of

__all__ = ["EvaluateSettings", "Evaluation", "EvaluationProgress", "evaluate_robustness"]


@dataclass(frozen=True)
class EvaluateSettings:
    """``attacks``: names or presets. ``eps``: in pixel units of [0, 1] images. ``individual``: each attack faces every
    example that is right at its clean image, which gives each a number of its own and costs several times as much.
    ``batch_size`` examples at a time go through an attack and on to disk: what a kill can cost. It may change from one
    session to the next, and so may ``device``, ``compile`` and ``channels_last``, which make the search faster.
    ``precision`` is that of the search: the judge is the model as it is, in float32.
    """

    attacks: tuple[str, ...]
    norm: Norm
    eps: float
    n_examples: int
    seed: int = 0
    batch_size: int = 256
    device: str = "cpu"
    individual: bool = False
    precision: Precision = "fp32"
    compile: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class EvaluationProgress:
    """Where an evaluation stands: ``attack`` (or ``clean``) on ``model`` is done with ``n_done`` of ``n_total`` examples.

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


def evaluate_robustness(
    model: SparsifiedModel,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    *,
    alpha: float,
    settings: EvaluateSettings,
    state_folder: Path,
    fingerprint: dict[str, str],
    n_classes: int,
    on_update: Callable[[EvaluationProgress], None] | None = None,
    smaller: Evaluation | None = None,
    pool: Mapping[str, Chunk] | None = None,
    shard: Shard | None = None,
) -> Evaluation:
    """Attack the first ``n_examples`` of ``x`` (n, channels, height, width) float32 in [0, 1] on both models.

    ``y`` (n,) true classes; ``indices`` (n,) positions in the data set, which fix the random starts. ``fingerprint``
    names what else the outcomes depend on (weights, statistics). The base model is ``model`` at alpha = 0.

    Finished chunks are read back from ``state_folder``; killed at any moment and called again, the outcomes are the same.
    A larger ``n_examples`` or a further attack adds to what is there. ``smaller``: the same evaluation at a smaller eps;
    what an attack broke there it has broken here, by the same image. It is not attacked again once both models have
    fallen: until then one model's images at this eps are still to be tried on the other. ``pool``: images from elsewhere,
    see ``read_pool``; they are tried last, so that no attack's own number depends on them. ``shard``: the examples given
    are those of this shard; without it, what shards have done in ``state_folder`` is taken over. Raises ``ArtifactError`` where
    the folder belongs to other settings or examples, ``ConfigError``, ``DataError`` and ``AttackError`` as ``run_attack``
    does.
    """
    n = settings.n_examples
    if settings.batch_size < 1 or n < 1:
        raise ConfigError(f"n_examples = {n} and batch_size = {settings.batch_size} must be 1 or above")
    if not len(x) == len(y) == len(indices) or len(x) < n:
        raise DataError(f"{n} examples are wanted; got {len(x)} images, {len(y)} labels and {len(indices)} indices")
    order = run_order(expand_attacks(settings.attacks))
    state = EvaluationState(
        state_folder,
        {
            "norm": settings.norm,
            "eps": settings.eps,
            "seed": settings.seed,
            "precision": settings.precision,
            "alpha": alpha,
            **fingerprint,
        },
        {attack: attack_version(attack) for attack in sorted(order)},
        torch.arange(n) if shard is None else torch.tensor(shard.positions(n * shard.count)),
        None if shard is None else shard.name,
    )
    state.check_examples(indices[:n], x[:n], y[:n])
    run = _Run(model, x[:n], y[:n].cpu(), indices[:n].cpu(), alpha, settings, state, n_classes, on_update, smaller)
    names = MODELS if alpha else MODELS[:1]  # at alpha = 0 the two models are one
    with under_attack(model):
        for name in names:
            run.classify_clean(name)
        for attack in order:
            for name in names:
                run.attack(name, attack)
        for images in (pool or {}).values():
            for name in names:
                run.try_pool(name, images)
    base = run.outcomes("base")
    sparsified = run.outcomes("sparsified") if alpha else replace(base, spent=dict.fromkeys(base.spent, Spent()))
    return Evaluation(alpha, order, run.indices.numpy(), run.y.numpy(), base, sparsified)


class _Run:
    """One evaluation at work; every mask is (n,) bool on the CPU."""

    def __init__(
        self,
        model: SparsifiedModel,
        x: Tensor,
        y: Tensor,
        indices: Tensor,
        alpha: float,
        settings: EvaluateSettings,
        state: EvaluationState,
        n_classes: int,
        on_update: Callable[[EvaluationProgress], None] | None,
        smaller: Evaluation | None,
    ) -> None:
        self.model, self.x, self.y, self.indices = model, x, y.long(), indices.long()
        self.alphas: dict[ModelName, float] = {"base": 0.0, "sparsified": alpha}
        self.settings, self.state, self.on_update = settings, state, on_update
        self.budget = Budget(settings.norm, settings.eps)
        self.correct = {name: self._blank() for name in MODELS}
        self.robust = {name: self._blank() for name in MODELS}
        self.transferred = {name: self._blank() for name in MODELS}
        self.n_transfer_passes = dict.fromkeys(MODELS, 0)
        self.faced: dict[ModelName, dict[str, Tensor]] = {name: {} for name in MODELS}
        self.broken: dict[ModelName, dict[str, Tensor]] = {name: {} for name in MODELS}
        self.spent: dict[ModelName, dict[str, Spent]] = {name: {} for name in MODELS}
        self.n_robust: dict[ModelName, dict[str, int]] = {name: {} for name in MODELS}
        self.upheld: dict[tuple[ModelName, str, str], Tensor] = {}
        self.carried = {name: self._carried(smaller, name) for name in MODELS}
        self.both_fell = self._blank()
        if smaller is not None:
            base, sparse = (smaller.outcomes(name).robust_to((*smaller.attacks, TRANSFER)) for name in MODELS)
            assert base is not None and sparse is not None  # both models ran to the end of the smaller eps
            self.both_fell = torch.from_numpy(~(base | sparse))
        for name in MODELS:
            self.transferred[name] |= self.carried[name].get(TRANSFER, self._blank())
        self.problem = Problem(
            model,
            self.budget,
            n_classes,
            settings.seed,
            settings.batch_size,
            settings.precision,
            _faster(model, settings) if settings.channels_last or settings.compile else None,
        )

    def classify_clean(self, name: ModelName) -> None:
        """One forward pass for each example that has not had one."""
        attempted, wrong = self._blank(), self._blank()
        for _, chunk in self.state.chunks(name, CLEAN):
            attempted[chunk.positions], wrong[chunk.positions] = True, chunk.broken
        n_done = n_resumed = int(attempted.sum())
        for positions in self._chunks_of(~attempted):
            x, y, _ = self._examples(positions)
            wrong[positions] = self._misclassified(name, x, y)
            passes, none = torch.tensor([[1, 0]]).repeat(len(positions), 1), torch.zeros_like(positions)
            self.state.append(name, CLEAN, Chunk(positions, wrong[positions], passes, none))
            n_done += len(positions)
            self._tell(name, CLEAN, n_done, len(self.y), n_resumed)
        self.correct[name], self.robust[name] = ~wrong, ~wrong
        self.n_robust[name][CLEAN] = int(self.correct[name].sum())
        self._tell(name, CLEAN, n_done, len(self.y), n_resumed)

    def attack(self, name: ModelName, attack: str) -> None:
        """One attack on one model: the examples that it has not faced yet are attacked, every break is judged afresh."""
        wanted = (self.correct if self.settings.individual else self.robust)[name].clone()
        carried = self.carried[name].get(attack, self._blank()) & wanted
        attempted, broken, spent = carried & self.both_fell, self._blank(), Spent()
        for file, chunk in self.state.chunks(name, attack):
            attempted[chunk.positions] = True
            spent = self._judge(name, attack, file, chunk, wanted, broken, spent)
        n_total, n_resumed = int(wanted.sum()), int((wanted & attempted).sum())
        n_done = n_resumed
        self._tell(name, attack, n_done, n_total, n_resumed)

        def on_progress(n_more: int) -> None:
            nonlocal n_done
            n_done += n_more
            self._tell(name, attack, n_done, n_total, n_resumed)

        for positions in self._chunks_of(wanted & ~attempted):
            n_before = n_done
            chunk = self._run_attack(name, attack, positions, on_progress)
            file = self.state.append(name, attack, chunk)
            spent = self._judge(name, attack, file, chunk, wanted, broken, spent)
            n_done = n_before + len(positions)
        self.spent[name][attack] = spent
        broken |= carried
        self.faced[name][attack], self.broken[name][attack] = wanted, broken
        self.robust[name] &= ~broken
        self.n_robust[name][attack] = int(self.robust[name].sum())
        self._tell(name, attack, n_done, n_total, n_resumed)

    def try_pool(self, name: ModelName, pool: Chunk) -> None:
        """Try images from elsewhere on one model."""
        allowed = admissible(pool, self.x, self.budget)
        assert allowed.adversarial is not None
        y = self.y[allowed.positions].to(self.settings.device)
        broken = self._misclassified(name, allowed.adversarial.to(self.settings.device), y)
        self.transferred[name][allowed.positions[broken]] = True
        self.n_transfer_passes[name] += len(y)

    def outcomes(self, name: ModelName) -> ModelOutcomes:
        """Everything about one model, with ``transfer`` as the last attack."""
        faced = self.faced[name] | {TRANSFER: self.correct[name]}
        broken = self.broken[name] | {TRANSFER: self.transferred[name] & self.correct[name]}
        return ModelOutcomes(
            self.correct[name].numpy(),
            {attack: mask.numpy() for attack, mask in faced.items()},
            {attack: mask.numpy() for attack, mask in broken.items()},
            self.spent[name] | {TRANSFER: Spent(forward_passes=self.n_transfer_passes[name])},
        )

    def _run_attack(self, name: ModelName, attack: str, positions: Tensor, on_progress: Callable[[int], None]) -> Chunk:
        x, y, indices = self._examples(positions)
        with self._as(name):
            result = run_attack(attack, self.problem, Examples(x, y, indices), on_progress=on_progress)
        return chunk_of(positions, result)

    def _judge(
        self, name: ModelName, attack: str, file: str, chunk: Chunk, wanted: Tensor, broken: Tensor, spent: Spent
    ) -> Spent:
        """Mark in ``broken`` the ``wanted`` examples whose break holds; try their images on the other model as well.

        Returns ``spent`` with the cost of this chunk added.
        """
        counts = wanted[chunk.positions]  # examples that this session does not ask about have no part in its cost
        claimed = chunk.broken & counts
        key = (name, attack, file)
        if key not in self.upheld:
            self.upheld[key] = self._judge_afresh(name, chunk, claimed)
        upheld = self.upheld[key]
        broken[upheld] = True
        broken &= wanted
        n_unconfirmed = int(claimed.sum()) - int(broken[chunk.positions].sum())
        forward, backward = chunk.passes[counts].sum(dim=0).tolist()
        forward_broken, backward_broken = chunk.passes[claimed].sum(dim=0).tolist()
        return Spent(
            spent.forward_passes + forward,
            spent.backward_passes + backward,
            spent.seconds + chunk.seconds,
            spent.rejected + int(chunk.rejected[counts].sum()),
            spent.unconfirmed + n_unconfirmed,
            spent.n_attacked + int(counts.sum()),
            spent.n_attacked_broken + int(claimed.sum()),
            spent.forward_passes_broken + forward_broken,
            spent.backward_passes_broken + backward_broken,
        )

    def _carried(self, smaller: Evaluation | None, name: ModelName) -> dict[str, Tensor]:
        """Attack -> (n,) bool: broken by it at a smaller eps."""
        if smaller is None:
            return {}
        if smaller.indices.tolist() != self.indices.tolist() or smaller.alpha != self.alphas["sparsified"]:
            raise ConfigError("the evaluation at a smaller eps is of other examples, or of another alpha")
        return {attack: torch.from_numpy(mask.copy()) for attack, mask in smaller.outcomes(name).broken.items()}

    def _judge_afresh(self, name: ModelName, chunk: Chunk, claimed: Tensor) -> Tensor:
        """The positions of the ``claimed`` (m,) breaks of a chunk that hold."""
        positions = chunk.positions[claimed]
        if not len(positions) or chunk.adversarial is None:
            return positions[:0]
        x, y, _ = self._examples(positions)
        images = chunk.adversarial[claimed[chunk.broken]].to(x.device)
        allowed = within_budget(images, x, self.budget)
        # what is outside is not shown to a model, which may fail on it
        images = torch.where(allowed.to(x.device).view(-1, 1, 1, 1), images, x)
        other: ModelName = "sparsified" if name == "base" else "base"
        self.transferred[other][positions] |= allowed & self._misclassified(other, images, y)
        self.n_transfer_passes[other] += len(positions)
        return positions[allowed & self._misclassified(name, images, y)]

    def _misclassified(self, name: ModelName, images: Tensor, y: Tensor) -> Tensor:
        """(m,) bool on the CPU, in float32 and evaluation mode."""
        with self._as(name):
            return judge(self.problem, images, y).cpu()

    def _as(self, name: ModelName) -> AbstractContextManager[None]:
        return alpha_set(self.model, self.alphas[name])

    def _blank(self) -> Tensor:
        return torch.zeros(len(self.y), dtype=torch.bool)

    def _chunks_of(self, mask: Tensor) -> list[Tensor]:
        """Positions where ``mask`` (n,) is true, in order, ``batch_size`` at a time."""
        positions = mask.nonzero().flatten()
        return list(positions.split(self.settings.batch_size)) if len(positions) else []

    def _examples(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = self.settings.device
        return self.x[positions.to(self.x.device)].to(device), self.y[positions].to(device), self.indices[positions]

    def _tell(self, name: ModelName, attack: str, n_done: int, n_total: int, n_resumed: int) -> None:
        if self.on_update is not None:
            n_robust = {model: dict(counts) for model, counts in self.n_robust.items()}
            self.on_update(EvaluationProgress(name, attack, n_done, n_total, n_resumed, len(self.y), n_robust))


def _faster(model: nn.Module, settings: EvaluateSettings) -> nn.Module:
    """The model in the form that is searched: its values, up to rounding.

    In channels-last its convolution weights are laid out anew, in place: their values stay, so the judge may use them.
    """
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cast(nn.Module, torch.compile(model)) if settings.compile else model
