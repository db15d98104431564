"""Rules of sites and alphas, as ``meansparse measure`` is given them, to variants."""

from collections.abc import Sequence

from ..engine.cells import Variant, variant_of
from ..errors import ConfigError
from ..sites.find import Site
from ..sites.rules import parse_rule, select_sites

EVERY = {"single:*": "single:{i}", "first:*": "first:{n}"}
BASE = ("all", 0.0)


def site_rules_of(given: Sequence[str], sites: Sequence[Site]) -> list[str]:
    """The rules to score, ``single:*`` and ``first:*`` written out over ``sites``.

    Raises ConfigError for a malformed rule; SiteError, in ``variants_of``, for one that chooses nothing.
    """
    rules: list[str] = []
    for rule in given:
        if rule in EVERY:
            rules += [EVERY[rule].format(i=site.index, n=n) for n, site in enumerate(sites, start=1)]
            continue
        try:
            rules.append(parse_rule(rule))
        except ValueError as error:
            raise ConfigError(f"--sites {rule}: {error}") from error
    return list(dict.fromkeys(rules))


def variants_of(
    rules: Sequence[str], alphas: Sequence[float], sites: Sequence[Site]
) -> dict[tuple[str, float], Variant]:
    """(rule, alpha) -> an alpha for each site, the base first."""
    variants = {BASE: variant_of([0.0] * len(sites))}
    for rule in rules:
        used = {site.index for site in select_sites(list(sites), rule)}
        for alpha in alphas:
            variants[rule, alpha] = variant_of([alpha if site.index in used else 0.0 for site in sites])
    return variants
