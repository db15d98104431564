"""Can white-box attacks follow the gradients?"""

from dataclasses import replace

import torch

from ..attacks.losses import choose_loss
from ..errors import AttackError
from ..operator.defence import DefendedModel
from ..operator.observe import blocked_shares
from ..stats.format import percent
from .subject import CHECKS, Diagnostic, Subject

LOW_COSINE = 0.5
NOTHING_RIGHT = "no example is classified correctly"
FAR, NEAR = "the plain attacks climb in another direction than BPDA", "BPDA climbs much the same way"


def check_gradients(subject: Subject) -> list[Diagnostic]:
    """Masked features, plain against BPDA gradients (both of the sparsified model alone), gradients of zero."""
    of_operator = [_masked(subject), _cosine(subject)] if subject.name == "sparsified" else []
    return [*of_operator, _zero(subject)]


def _masked(subject: Subject) -> Diagnostic:
    """The share of features that operators replace: no plain gradient passes there."""
    if isinstance(subject.model, DefendedModel):
        return subject.not_run("masked", "counted at MeanSparse operators alone")
    shares = blocked_shares(subject.model, subject.x, batch_size=subject.problem.batch_that_fits)
    names = [site.name for site in subject.model.sites]
    mean, largest = sum(shares) / len(shares), max(shares)
    details = {"largest": largest, "sites": dict(zip(names, shares, strict=True))}
    words = {"mean": percent(mean, digits=1), "most": percent(largest, digits=1), "site": names[shares.index(largest)]}
    return subject.judged("masked", mean, words, details)


def _cosine(subject: Subject) -> Diagnostic:
    """Cosine of plain and BPDA input gradients of the cross-entropy, at clean images that are classified correctly."""
    rows = subject.correct.nonzero().flatten()
    if not len(rows):
        return subject.not_run("cosine", NOTHING_RIGHT)
    loss = choose_loss("ce", subject.problem.n_classes)
    try:
        plain, straight = (subject.gradients(loss, rule, rows) for rule in ("true", "identity"))
    except AttackError as error:
        return subject.not_run("cosine", error.message)
    cosines = torch.nn.functional.cosine_similarity(plain.double().flatten(1), straight.double().flatten(1), eps=1e-300)
    median, n_low = float(cosines.median()), int((cosines < LOW_COSINE).sum())
    words = {
        "n": len(rows),
        "low": LOW_COSINE,
        "n_low": n_low,
        "way": FAR if median < CHECKS["cosine"]["limit"] else NEAR,
    }
    return subject.judged("cosine", median, words, {"share_below_half": n_low / len(rows)})


def _zero(subject: Subject) -> Diagnostic:
    """The share of images whose gradient of cross-entropy or DLR is zero or NaN: an attack on it stands still."""
    rows = subject.correct.nonzero().flatten()
    if not len(rows):
        return subject.not_run("zero", NOTHING_RIGHT)
    bad, counts = torch.zeros(len(rows), dtype=torch.bool), {}
    try:
        for name in ("ce", "dlr"):
            loss = choose_loss(name, subject.problem.n_classes)  # type: ignore[arg-type]
            flat = subject.gradients(loss, "true", rows).flatten(1)
            found = (~torch.isfinite(flat).all(dim=1) | (flat == 0).all(dim=1)).cpu()
            bad |= found
            counts[name] = int(found.sum())
    except AttackError as error:
        return replace(subject.not_run("zero", error.message), status="warn", value=1.0)
    return subject.judged("zero", float(bad.float().mean()), {"n_bad": int(bad.sum()), "n": len(rows)}, counts)
