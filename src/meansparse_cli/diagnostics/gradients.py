"""Doubts about the gradients that white-box attacks follow."""

import torch
from torch import Tensor

from ..attacks.losses import choose_loss
from ..errors import AttackError
from ..operator.observe import blocked_shares
from .doubt import AUTOATTACK, CARLINI, OWN, Check, Doubt, Subject

MASKED = Check("features masked, mean of sites", 0.1, "share", OWN)
COSINE = Check("cosine of plain and BPDA gradient", 0.9, "number", OWN, at_least=True)
ZERO = Check("zero or NaN gradients", 0, "share", f"{AUTOATTACK}; {CARLINI}")

LOW_COSINE = 0.5


def doubt_gradients(subject: Subject) -> list[Doubt]:
    """The first two are about the operator, and so about the sparsified model alone."""
    of_operator = [_masked(subject), _cosine(subject)] if subject.name == "sparsified" else []
    return [*of_operator, _zero(subject)]


def _masked(subject: Subject) -> Doubt:
    """Where a feature is masked, no plain gradient passes."""
    shares = blocked_shares(subject.model, subject.x, batch_size=subject.batch_size)
    mean, largest = sum(shares) / len(shares), max(shares)
    worst = subject.model.sites[shares.index(largest)].name
    return MASKED.judged(
        subject, mean,
        f"{100 * mean:.1f} % of the features of a site are replaced by their mean, {100 * largest:.1f} % at {worst}: no "
        "plain gradient passes there, so that plain attacks see less than there is",
        largest=largest, sites={site.name: share for site, share in zip(subject.model.sites, shares, strict=True)},
    )  # fmt: skip


def _cosine(subject: Subject) -> Doubt:
    """Between the two input gradients of the cross-entropy, at the clean images that are classified correctly."""
    rows = subject.correct.nonzero().flatten()
    if not len(rows):
        return COSINE.not_run(subject, "no example is classified correctly")
    try:
        plain, straight = (
            subject.gradients(choose_loss("ce", subject.n_classes), rule, rows) for rule in ("true", "identity")
        )
    except AttackError as error:
        return COSINE.not_run(subject, error.message)
    cosines = torch.nn.functional.cosine_similarity(plain.double().flatten(1), straight.double().flatten(1), eps=1e-300)
    median, n_low = float(cosines.median()), int((cosines < LOW_COSINE).sum())
    words = (
        "the plain attacks climb in another direction than BPDA"
        if median < COSINE.limit
        else "BPDA climbs much the same way"
    )
    return COSINE.judged(
        subject, median, f"median {median:.2f} over {len(rows)} examples, below {LOW_COSINE} for {n_low}: {words}",
        share_below_half=n_low / len(rows),
    )  # fmt: skip


def _zero(subject: Subject) -> Doubt:
    """The gradients of cross-entropy and of the difference of logits ratio; an attack on either stands still."""
    rows = subject.correct.nonzero().flatten()
    if not len(rows):
        return ZERO.not_run(subject, "no example is classified correctly")
    bad, counts = torch.zeros(len(rows), dtype=torch.bool), {}
    try:
        for name in ("ce", "dlr"):
            gradient = subject.gradients(choose_loss(name, subject.n_classes), "true", rows)  # type: ignore[arg-type]
            found = _is_zero_or_nan(gradient).cpu()
            bad |= found
            counts[name] = int(found.sum())
    except AttackError as error:
        return ZERO.judged(subject, 1.0, error.message)
    share = float(bad.float().mean())
    return ZERO.judged(
        subject, share,
        f"{int(bad.sum())} of {len(rows)} examples have an input gradient of zero or NaN: {counts['ce']} under the "
        f"cross-entropy, {counts['dlr']} under the difference of logits ratio",
        **counts,
    )  # fmt: skip


def _is_zero_or_nan(gradient: Tensor) -> Tensor:
    flat = gradient.flatten(1)
    return ~torch.isfinite(flat).all(dim=1) | (flat == 0).all(dim=1)
