"""The catalogue of attacks: name -> what it is and costs. Without torch, so that ``--help`` can list them at once."""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..errors import ConfigError


@dataclass(frozen=True)
class AttackSpec:
    """One attack of the catalogue.

    ``search`` is the family that looks for adversarial images (``runner.SEARCHES``), ``options`` what it is called
    with. ``backward`` is what its gradients meet at every MeanSparse operator: ``true`` (plain attacks), ``identity``,
    ``soft:T``, ``soft:TtoL`` or ``base``, the base model's (``operator.active.backward_rule``, ``judge.CountedModel``).
    ``cost`` is that of an example that survives, in forward passes at 10 classes, a backward pass counted as two.
    ``start_of``: whose random starts it shares, where not its own. ``has_hooks``: it puts hooks on the operators.
    """

    name: str
    description: str
    search: str
    cost: int
    backward: str = "true"
    options: tuple[tuple[str, float], ...] = ()
    start_of: str = ""
    has_hooks: bool = False

    @property
    def start(self) -> str:
        return self.start_of or self.name

    @property
    def is_bpda(self) -> bool:
        """Do its gradients meet something else than the operator's derivative? A very sharp band is next to that."""
        if self.backward.startswith("soft:"):
            return _widths(self.backward.removeprefix("soft:"))[0] >= SHARPEST_BAND
        return self.backward != "true"


_APGD = {
    "apgd-ce": ("APGD on cross-entropy, 100 steps, 1 start", 301),
    "apgd-dlr": ("APGD on the difference of logits ratio, 100 steps, 1 start", 301),
    "apgd-t": ("APGD on the targeted DLR, 100 steps for each of 9 target classes", 2709),
}
_LOSSES = {
    "ce": "cross-entropy",
    "dlr": "DLR",
    "margin": "margin of the logits",
    "probability": "margin of the probabilities",
}
SHARPEST_BAND = 0.01
"""Standard deviations, of the edge that a search begins with: one that is sharp from the start finds next to nothing
in a deep network, as the operator's own step does."""
N_CANDIDATES = 9
"""The likeliest classes, of which the nearest are aimed at; AutoAttack's targeted attacks aim at all of them."""
TEMPERATURES = ("0.05", "0.2", "0.5")
"""Of the soft bands in the catalogue, in standard deviations; any other is written ``soft-T-apgd-ce``."""


def _widths(text: str) -> list[float]:
    """``T`` or ``TtoL``, the width of a soft edge, at first and at last."""
    return [float(width) for width in text.split("to")]


def _through(prefix: str | None, plain: AttackSpec, *, start_of: str = "") -> AttackSpec:
    """An attack through the backward rule that ``prefix`` names; the ``plain`` one itself without a prefix."""
    if not prefix:
        return plain
    if prefix == "bpda":
        backward, words = "identity", ", with gradients straight through MeanSparse (BPDA)"
    elif prefix == "base-gradient":
        backward, words = "base", ", with the base model's gradients (BPDA)"
    else:
        width = prefix.removeprefix("soft-")
        words = f", with the gradients of a band whose edge is {width.replace('to', ' to ')} std soft"
        backward, words = f"soft:{width}", words + (" (BPDA)" if _widths(width)[0] >= SHARPEST_BAND else "")
    passes = 4 / 3 if backward == "base" else 1  # two forward passes a step
    return replace(
        plain,
        name=f"{prefix}-{plain.name}",
        description=plain.description + words,
        cost=round(plain.cost * passes),
        backward=backward,
        start_of=start_of,
    )


def _apgd(search: str, prefix: str = "") -> AttackSpec:
    """AutoAttack's APGD; through another backward rule it has starts of its own."""
    description, cost = _APGD[search]
    return _through(prefix, AttackSpec(search, description, search, cost))


def _pgd(n_steps: int) -> AttackSpec:
    words = "50 steps of 0.0078, 1 start; the paper's PGD-50" if n_steps == 50 else f"{n_steps} steps of 2/255, 1 start"
    options = (("n_steps", n_steps),)
    return AttackSpec(f"pgd-{n_steps}", f"PGD on cross-entropy, {words}", "pgd", 3 * n_steps + 1, options=options)


def _adaptive(p: int, q: int, weight: str | None) -> AttackSpec:
    """The paper's Adaptive-(p,q), from the same images whatever p, q and ``weight``, its lambda."""
    name = f"adaptive-{p}-{q}" + ("" if weight is None else f":{weight}")
    value = "1 / number of features at the sites (the paper gives none)" if weight is None else weight
    steps = "PGD, 50 steps of 1/255, 1 random start that is the same for all of them"
    description = f"the paper's Adaptive-({p},{q}): {steps}, with lambda {value}"
    options: tuple[tuple[str, float], ...] = (("p", p), ("q", q))
    if weight is not None:
        options += (("weight", float(weight)),)
    return AttackSpec(name, description, "adaptive", 204, options=options, start_of="adaptive", has_hooks=True)


def _short(prefix: str | None, loss: str, order: str | None, n_targets: str | None, n_steps: str) -> AttackSpec:
    """APGD of so many steps, on each of ``n_targets`` classes or untargeted; one start whatever the backward rule.

    ``order`` of the targets: ``t``, the likeliest; ``near``, of the likeliest the nearest (``targets.nearest_first``).
    """
    name = f"apgd-{loss}" + (f"-{order}{n_targets}" if n_targets else "") + f"-{n_steps}"
    search = f"apgd-{loss}" + ("-t" if n_targets else "")
    words = f"APGD on the {'targeted ' if n_targets else ''}{_LOSSES[loss]}, {n_steps} steps"
    n_candidates = max(N_CANDIDATES, int(n_targets or 1)) if order == "near" else 0
    nearest = f", of the {n_candidates} likeliest those nearest to the first order" if n_candidates else ""
    words += f" for each of {n_targets} target classes{nearest}" if n_targets else ", 1 start"
    options: tuple[tuple[str, float], ...] = (("n_steps", int(n_steps)), ("n_attempts", int(n_targets or 1)))
    cost = 1 + 3 * int(n_steps) * int(n_targets or 1)
    if n_candidates:
        options, cost = (*options, ("n_candidates", n_candidates)), cost + 1 + 2 * n_candidates
    plain = AttackSpec(name, words, "apgd-t" if search == "apgd-dlr-t" else search, cost, options=options)
    return _through(prefix, plain, start_of=name)


def _cosine(prefix: str | None, loss: str, n_starts: str, n_steps: str) -> AttackSpec:
    """Sign steps that shrink along a cosine, from some random starts; the same ones whatever the backward rule."""
    name = f"cosine-{loss}-{n_starts}x{n_steps}"
    words = (
        f"sign steps on the {_LOSSES[loss]} that shrink along a cosine, {n_steps} steps from each of {n_starts} starts"
    )
    options = (("n_steps", int(n_steps)), ("n_attempts", int(n_starts)))
    plain = AttackSpec(name, words, f"cosine-{loss}", 1 + 3 * int(n_steps) * int(n_starts), options=options)
    return _through(prefix, plain, start_of=name)


_CATALOGUE = (
    _pgd(50),
    _adaptive(1, 1, None),
    _adaptive(2, 2, None),
    *(_apgd(search) for search in ("apgd-ce", "apgd-dlr")),
    *(_apgd(search, "bpda") for search in ("apgd-ce", "apgd-dlr")),
    *(_apgd("apgd-ce", f"soft-{temperature}") for temperature in TEMPERATURES),
    *(_apgd("apgd-dlr", f"soft-{temperature}") for temperature in TEMPERATURES),
    *(_apgd(search, "base-gradient") for search in ("apgd-ce", "apgd-dlr")),
    _apgd("apgd-t"),
    _apgd("apgd-t", "bpda"),
    AttackSpec("fab-t", "FAB, 100 steps for each of 9 target classes", "fab-t", 2800),
    AttackSpec("square", "Square Attack, black box, 5000 queries", "square", 5001),
)
ATTACKS: dict[str, AttackSpec] = {spec.name: spec for spec in _CATALOGUE}
"""Every attack that has a fixed name, cheapest first: the order in which they run, each on what the ones before have
left. ``find_attack`` knows more: ``pgd-N``, ``adaptive-P-Q:LAMBDA``, ``soft-T-apgd-t`` and the like."""

FAST = (
    "apgd-margin-30",
    "soft-0.05to0.005-apgd-margin-30",
    "bpda-apgd-ce-30",
    "soft-0.1to0.005-apgd-probability-40",
    "soft-0.05to0.005-apgd-dlr-50",
    "soft-0.05to0.005-apgd-margin-near2-40",
)
"""The plain one first, whose random start its twin through the soft band shares: the verdict needs a plain number."""

PRESETS: dict[str, tuple[str, ...]] = {
    "fast": FAST,
    "surrogate": FAST[1:],  # the worst case beside plain attacks of one's own
    "apgd": ("apgd-ce", "apgd-dlr"),
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),  # AutoAttack's standard version
    "autoattack": ("apgd-ce", "apgd-t", "fab-t", "square"),
    # identity and a soft edge: each breaks what the other leaves (docs/results/fast.md)
    "bpda": ("bpda-apgd-ce", "bpda-apgd-dlr", "bpda-apgd-t", "soft-0.05-apgd-ce", "soft-0.05-apgd-dlr"),
    "backward": tuple(name for name, spec in ATTACKS.items() if spec.backward != "true"),
    "adaptive": ("adaptive-1-1", "adaptive-2-2"),
    "paper": ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "pgd-50"),
    "full": tuple(ATTACKS),
}
"""Names for sets of attacks."""

_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
_SOFT = rf"soft-{_NUMBER}(?:to{_NUMBER})?"
_PREFIX = rf"(?:(bpda|base-gradient|{_SOFT})-)?"
_FAMILIES: tuple[tuple[str, Callable[..., AttackSpec]], ...] = (
    (r"pgd-([1-9]\d*)", lambda n_steps: _pgd(int(n_steps))),
    (rf"adaptive-([1-9])-([1-9])(?::({_NUMBER}))?", lambda p, q, weight: _adaptive(int(p), int(q), weight)),
    (rf"({_SOFT}|base-gradient)-(apgd-ce|apgd-dlr|apgd-t)", lambda prefix, search: _apgd(search, prefix)),
    (rf"{_PREFIX}apgd-(ce|dlr|margin|probability)-([1-9]\d*)", lambda rule, loss, n: _short(rule, loss, None, None, n)),
    (rf"{_PREFIX}apgd-(dlr|margin|probability)-(t|near)([1-9]\d*)-([1-9]\d*)", _short),
    (rf"{_PREFIX}cosine-(margin|probability)-([1-9]\d*)x([1-9]\d*)", _cosine),
)


def find_attack(name: str) -> AttackSpec:
    """The attack called ``name``. Raises ``ConfigError``, naming the nearest ones, where there is none."""
    if name in ATTACKS:
        return ATTACKS[name]
    for pattern, make in _FAMILIES:
        if match := re.fullmatch(pattern, name):
            spec = make(*match.groups())
            if spec.backward.startswith("soft") and min(_widths(spec.backward.removeprefix("soft:"))) <= 0:
                raise ConfigError(f"{name}: the temperature must be above 0")
            return spec
    nearest = difflib.get_close_matches(name.lower(), [*ATTACKS, *PRESETS], n=3, cutoff=0.5)
    raise ConfigError(
        f"unknown attack {name!r}" + (f"; did you mean {' or '.join(nearest)}?" if nearest else ""),
        hint=f"Attacks: {', '.join(ATTACKS)}, pgd-N, adaptive-P-Q:LAMBDA, soft-T-apgd-ce, apgd-margin-N. "
        f"Sets of attacks: {', '.join(PRESETS)}.",
    )


def expand_attacks(names: Iterable[str]) -> list[str]:
    """Names of attacks and presets -> names of attacks, each once, cheapest first; ``ConfigError`` for an unknown."""
    named = list(names)
    given = [name for name in named if name != "transfer"]  # which is always part of an evaluation
    if named and not given:
        raise ConfigError(
            "transfer tries the images that other attacks found", hint="name one of these too: --attack apgd-ce"
        )
    if not given:
        raise ConfigError("no attack was named", hint=f"Attacks: {', '.join(ATTACKS)}.")
    wanted = {member: find_attack(member) for name in given for member in PRESETS.get(name, (name,))}
    place = {name: i for i, name in enumerate(ATTACKS)}
    fast = {name: i for i, name in enumerate(FAST if "fast" in given else ())}
    return sorted(
        wanted, key=lambda name: (fast.get(name, len(fast)), wanted[name].cost, place.get(name, len(place)), name)
    )
