"""Can white-box attacks follow the gradients?"""

import torch

from ..attacks.losses import choose_loss
from ..errors import AttackError
from ..operator.observe import blocked_shares
from ..stats.format import percent
from .check import AUTOATTACK, CARLINI, OWN, Check, Diagnostic
from .subject import Subject

MASKED = Check("features masked, mean of sites", 0.1, "share", OWN)
COSINE = Check("cosine of plain and BPDA gradient", 0.9, "number", OWN, at_least=True)
ZERO = Check("zero or NaN gradients", 0, "share", f"{AUTOATTACK}; {CARLINI}")

LOW_COSINE = 0.5
NOTHING_RIGHT = "no example is classified correctly"


def check_gradients(subject: Subject) -> list[Diagnostic]:
    """Masked features, plain against BPDA gradients (both of the sparsified model alone), gradients of zero."""
    of_operator = [_masked(subject), _cosine(subject)] if subject.name == "sparsified" else []
    return [*of_operator, _zero(subject)]


def _masked(subject: Subject) -> Diagnostic:
    """The share of features that operators replace: no plain gradient passes there."""
    shares = blocked_shares(subject.model, subject.x, batch_size=subject.problem.batch_size)
    by_site = {site.name: share for site, share in zip(subject.model.sites, shares, strict=True)}
    mean, largest = sum(shares) / len(shares), max(shares)
    worst = f"{percent(largest, digits=1)} % at {subject.model.sites[shares.index(largest)].name}"
    sentence = (
        f"{percent(mean, digits=1)} % of the features of a site are replaced by their mean, {worst}: no plain "
        "gradient passes there, so that plain attacks see less than there is"
    )
    return MASKED.judged(subject.name, mean, sentence, largest=largest, sites=by_site)


def _cosine(subject: Subject) -> Diagnostic:
    """Cosine of plain and BPDA input gradients of the cross-entropy, at clean images that are classified correctly."""
    rows = subject.correct.nonzero().flatten()
    if not len(rows):
        return COSINE.not_run(subject.name, NOTHING_RIGHT)
    loss = choose_loss("ce", subject.problem.n_classes)
    try:
        plain, straight = (subject.gradients(loss, rule, rows) for rule in ("true", "identity"))
    except AttackError as error:
        return COSINE.not_run(subject.name, error.message)
    cosines = torch.nn.functional.cosine_similarity(plain.double().flatten(1), straight.double().flatten(1), eps=1e-300)
    median, n_low = float(cosines.median()), int((cosines < LOW_COSINE).sum())
    far, near = "the plain attacks climb in another direction than BPDA", "BPDA climbs much the same way"
    sentence = (
        f"median {median:.2f} over {len(rows)} examples, below {LOW_COSINE} for {n_low}: "
        f"{far if median < COSINE.limit else near}"
    )
    return COSINE.judged(subject.name, median, sentence, share_below_half=n_low / len(rows))


def _zero(subject: Subject) -> Diagnostic:
    """The share of images whose gradient of cross-entropy or DLR is zero or NaN: an attack on it stands still."""
    rows = subject.correct.nonzero().flatten()
    if not len(rows):
        return ZERO.not_run(subject.name, NOTHING_RIGHT)
    bad, counts = torch.zeros(len(rows), dtype=torch.bool), {}
    try:
        for name in ("ce", "dlr"):
            loss = choose_loss(name, subject.problem.n_classes)  # type: ignore[arg-type]
            flat = subject.gradients(loss, "true", rows).flatten(1)
            found = (~torch.isfinite(flat).all(dim=1) | (flat == 0).all(dim=1)).cpu()
            bad |= found
            counts[name] = int(found.sum())
    except AttackError as error:
        return ZERO.judged(subject.name, 1.0, error.message)
    sentence = (
        f"{int(bad.sum())} of {len(rows)} examples have an input gradient of zero or NaN: {counts['ce']} under the "
        f"cross-entropy, {counts['dlr']} under the difference of logits ratio"
    )
    return ZERO.judged(subject.name, float(bad.float().mean()), sentence, **counts)
