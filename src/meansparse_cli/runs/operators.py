"""The operators that a stage puts into the model: the checkpoint and the alpha in use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..attacks.problem import Budget, Problem
from ..data.examples import Examples
from ..errors import ConfigError
from ..models.export import load_exported
from ..operator.checkpoint import Checkpoint, load_checkpoint, sparsify
from ..operator.device import Precision, precision_on
from ..operator.insertion import SparsifiedModel
from ..settings.stages import EvaluateConfig, StageConfig, SweepAlphaConfig, VerifyConfig
from ..settings.values import eps_value
from ..sites.rules import among_published, select_sites
from .checks import check_model
from .context import RunContext

DEFAULT_OPTIONS = ("all", "channel-mean", "channel-std")


def load_sparsified(
    run: str | Path,
    *,
    alpha: float | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    allow_code: bool = False,
) -> SparsifiedModel:
    """The sparsified model of a finished sweep, ready to use: an ``nn.Module`` in eval mode, images in, logits out.

    ``run`` is the run folder, or one file written by ``meansparse export``. ``alpha`` overrides the chosen one: as in
    ``evaluate --alpha`` and ``export --alpha`` at all calibrated sites, around the channel means, whatever the sweep
    had; 0 is bit-identical to the base model. ``allow_pickle``: as ``fetch --allow-pickle``, for a run's weights that
    need code to load. ``allow_code``: import the ``module:factory`` that an exported file names as its network.
    """
    if Path(run).is_file():
        return load_exported(Path(run), alpha=alpha, device=device, allow_code=allow_code)
    context = RunContext("load", StageConfig(run=Path(run), allow_pickle=allow_pickle))
    checkpoint = checkpoint_in_use(context, alpha)
    return sparsify(context.base(checkpoint.rule, device=device), checkpoint, alpha=alpha)


def problem_of(
    context: RunContext,
    checkpoint: Checkpoint,
    examples: Examples,
    eps: str,
    *,
    alpha: float = 0.0,
    precision: Precision | None = None,
) -> Problem:
    """The sparsified model at ``alpha`` and a budget, once model, examples and classes are found to fit together."""
    base, config = context.base(checkpoint.rule), context.config
    n_classes = check_model(context, base, context.split("test"), examples.x[:2])
    return Problem(
        sparsify(base, checkpoint, alpha=alpha),
        Budget(context.run.norm, eps_value(eps)),  # type: ignore[arg-type]
        n_classes,
        config.seed,
        config.batch_size,
        precision_on(context.device, precision),
    )


def alpha_in_use(context: RunContext, given: float | None) -> tuple[float, str]:
    """Alpha, and the stage it comes from: the one given, the sweep's, or the one stored in a published checkpoint."""
    if given is not None:
        context.verified("calibrate")
        return given, "calibrate"
    if context.has("calibrate") and not context.has("sweep-alpha"):
        stored = context.verified("calibrate")["results"].get("alpha")
        if stored is not None:
            return float(stored), "calibrate"
    return float(context.verified("sweep-alpha")["results"]["alpha"]), "sweep-alpha"


def has_alpha(context: RunContext) -> bool:
    """Was one chosen by a sweep, or stored in a published checkpoint?"""
    if context.has("sweep-alpha"):
        return True
    return context.verified("calibrate")["results"].get("alpha") is not None


def checkpoint_in_use(context: RunContext, given: float | None) -> Checkpoint:
    """The operators that evaluate would use, with their alpha."""
    alpha, stage = alpha_in_use(context, given)
    paths = context.run.paths
    file = paths.checkpoint if stage == "sweep-alpha" else paths.statistics
    return replace(load_checkpoint(file), alpha=alpha)


def with_options(statistics: Checkpoint, config: SweepAlphaConfig | EvaluateConfig | VerifyConfig) -> Checkpoint:
    """The statistics with the sites, the centre and the spread that the settings ask for."""
    weights = None
    if config.sites != "all":
        rule = among_published(config.sites) or config.sites
        used = {site.index for site in select_sites(list(statistics.sites), rule)}
        if len(used) < len(statistics.sites):
            weights = tuple(float(site.index in used) for site in statistics.sites)
    return replace(statistics, site_weights=weights, centre=config.centre, spread=config.spread)


def checkpoint_to_evaluate(context: RunContext, config: EvaluateConfig | VerifyConfig, upstream: str) -> Checkpoint:
    """What the sweep chose, sites and options included; without a sweep, the statistics as the settings say."""
    paths = context.run.paths
    if upstream == "calibrate":
        return with_options(load_checkpoint(paths.statistics), config)
    asked = (config.sites, config.centre, config.spread)
    swept = context.verified("sweep-alpha")["config"]["settings"]
    if asked not in (DEFAULT_OPTIONS, tuple(swept[key] for key in ("sites", "centre", "spread"))):
        raise ConfigError(
            "--sites, --centre and --spread of evaluate go with --alpha: without it, the sweep's checkpoint decides",
            hint="give an alpha, or choose one with them: "
            f"{context.run.command('sweep-alpha')} --centre {config.centre}",
        )
    return load_checkpoint(paths.checkpoint)
