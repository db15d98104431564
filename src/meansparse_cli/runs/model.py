"""The model a stage runs: base weights, the sites of a rule, the checkpoint and alpha in use."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import ArtifactError, ConfigError
from ..operator.checkpoint import Checkpoint, load_checkpoint
from ..settings.stages import AttackConfig, CalibrateConfig, EvaluateConfig, ModelConfig, SweepAlphaConfig, VerifyConfig
from ..settings.values import check_eps, eps_grid
from .folder import Run, verified, weights_id, weights_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..models.published_checkpoint import PublishedCheckpoint
    from ..sites.find import Site


def pick_device(name: str) -> str:
    """``auto`` is the first GPU, else the CPU, on which freed memory stays with the process."""
    import torch

    from .allocator import keep_freed_memory

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {error}", hint="--device auto, cpu or cuda:0") from error
    if name == "cpu":
        keep_freed_memory()
    return name


def load_base(run: Run, config: ModelConfig, device: str, rule: str = "all") -> nn.Module:
    """The base model; its architecture has places for the authors' operators where the site rule speaks of them.

    Raises ArtifactError where a factory builds other weights than it did for ``fetch``.
    """
    from ..models.source import load_model
    from ..models.weights import network_id
    from ..sites.rules import among_published

    paths = weights_of(run)
    model = load_model(
        run.source, paths or None, allow_pickle=config.allow_pickle, published_sites=among_published(rule) is not None
    )
    if not paths and weights_id(run) not in (None, network_id(model)):
        raise ArtifactError(
            f"{run.source.name} builds another network than the one that was fetched",
            hint=f"--weights FILE fixes its weights, or torch.manual_seed; if it was meant to change: {run.command('fetch')} --fresh",
        )
    return model.to(device).eval()


def held_by_weights(run: Run, config: ModelConfig) -> PublishedCheckpoint | None:
    """The published operators in the run's weights, if these are a file that has them."""
    from ..models.published_checkpoint import read_published
    from ..models.source import kind_of

    paths = weights_of(run)
    if kind_of(run.source).entry is None or len(paths) != 1:
        return None
    return read_published(paths[0], allow_pickle=config.allow_pickle)


def with_site_rule(run: Run, config: CalibrateConfig, sources: dict[str, str]) -> CalibrateConfig:
    """A model that has operators of its own, and statistics that are stored, mean the authors' sites by default."""
    from ..models.published_checkpoint import published_architecture
    from ..models.source import kind_of
    from ..sites.rules import PUBLISHED, among_published

    if among_published(config.sites) is not None:
        return config
    entry = kind_of(run.source).entry
    has_operators = entry is not None and published_architecture(entry) == entry
    if sources.get("sites", "default") == "default" and (has_operators or config.statistics == "stored"):
        return config.model_copy(update={"sites": PUBLISHED})
    if config.statistics == "stored":
        raise ConfigError(
            f"--sites {config.sites} with --statistics stored: a checkpoint stores those of the authors' sites only",
            hint=f"choose among them: --sites {PUBLISHED}:{config.sites}",
        )
    return config


def sites_of_rule(model: nn.Module, run: Run, config: CalibrateConfig, images: Tensor) -> list[Site]:
    """The sites that the rule chooses among."""
    from ..models.published_checkpoint import published_files_of
    from ..models.published_sites import published_sites
    from ..models.source import kind_of
    from ..sites.find import find_sites
    from ..sites.rules import among_published

    if among_published(config.sites) is None:
        return find_sites(model, images)
    files = published_files_of(kind_of(run.source).entry)
    return published_sites(model, images, held_by_weights(run, config), files)


def alpha_in_use(run: Run, given: float | None) -> tuple[float, str]:
    """Alpha, and the stage it comes from: the one given, the sweep's, or the one stored in a published checkpoint."""
    if given is not None:
        verified(run, "calibrate")
        return given, "calibrate"
    if run.paths.report("calibrate").exists() and not run.paths.report("sweep-alpha").exists():
        stored = verified(run, "calibrate")["results"].get("alpha")
        if stored is not None:
            return float(stored), "calibrate"
    return float(verified(run, "sweep-alpha")["results"]["alpha"]), "sweep-alpha"


def has_alpha(run: Run) -> bool:
    """Was one chosen by a sweep, or stored in a published checkpoint?"""
    if run.paths.report("sweep-alpha").exists():
        return True
    return verified(run, "calibrate")["results"].get("alpha") is not None


def checkpoint_in_use(run: Run, given: float | None) -> Checkpoint:
    """The operators that evaluate would use, with their alpha."""
    alpha, stage = alpha_in_use(run, given)
    file = run.paths.checkpoint if stage == "sweep-alpha" else run.paths.statistics
    return replace(load_checkpoint(file), alpha=alpha)


def with_options(statistics: Checkpoint, config: SweepAlphaConfig | EvaluateConfig | VerifyConfig) -> Checkpoint:
    """The statistics with the sites, the centre and the spread that the settings ask for."""
    weights = None
    if config.sites != "all":
        from ..sites.rules import among_published, select_sites

        rule = among_published(config.sites) or config.sites
        used = {site.index for site in select_sites(list(statistics.sites), rule)}
        if len(used) < len(statistics.sites):
            weights = tuple(float(site.index in used) for site in statistics.sites)
    return replace(statistics, site_weights=weights, centre=config.centre, spread=config.spread)


def checkpoint_to_evaluate(run: Run, config: EvaluateConfig | VerifyConfig, upstream: str) -> Checkpoint:
    """What the sweep chose, sites and options included; without a sweep, the statistics as the settings say."""
    if upstream == "calibrate":
        return with_options(load_checkpoint(run.paths.statistics), config)
    asked = (config.sites, config.centre, config.spread)
    swept = verified(run, "sweep-alpha")["config"]["settings"]
    if asked not in (
        ("all", "channel-mean", "channel-std"),
        tuple(swept[key] for key in ("sites", "centre", "spread")),
    ):
        raise ConfigError(
            "--sites, --centre and --spread of evaluate go with --alpha: without it, the sweep's checkpoint decides",
            hint=f"give an alpha, or choose one with them: {run.command('sweep-alpha')} --centre {config.centre}",
        )
    return load_checkpoint(run.paths.checkpoint)


def eps_of(run: Run, config: AttackConfig) -> str:
    """The budget, or grid of budgets, as text: that of the settings, else the data set's own; refused beyond its limit."""
    from ..data.datasets import KNOWN_DATASETS

    facts = KNOWN_DATASETS.get(run.source.dataset)
    eps = config.eps or (facts.eps[run.norm] if facts is not None else None)
    if eps is None:
        raise ConfigError("no eps is known for this data set", hint="give one: --eps 8/255")
    for one in eps_grid(eps):
        check_eps(one, run.norm)
    return eps
