"""``meansparse sites``: the activations of a model, and which of them calibrate would use."""

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.published_checkpoint import (
    PublishedCheckpoint,
    published_architecture,
    published_files_of,
    read_published,
)
from ..models.published_sites import published_sites
from ..models.source import kind_of
from ..runs.context import RunContext
from ..settings.stages import CalibrateConfig
from ..sites.find import Site, find_sites
from ..sites.rules import PUBLISHED, among_published, chosen_by
from .fetch import ensure_fetched


def list_sites(config: CalibrateConfig, sources: dict[str, str]) -> tuple[list[Site], dict[int, str]]:
    """Every site, gates included and marked; and by index, for those that calibrate would use, what chose them."""
    ensure_fetched(config, sources)
    context = RunContext("sites", config, sources)
    context.config = config = with_site_rule(context)
    model = context.base(config.sites, device="cpu")
    if (shape := context.image_shape) is not None:
        images = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    else:
        images = context.examples(context.take("calibration", 2)).x
    found = sites_of_rule(context, model, images)
    return found, chosen_by(found, config.sites, include_gates=config.include_gates)


def with_site_rule(context: RunContext[CalibrateConfig]) -> CalibrateConfig:
    """A model that has operators of its own, and statistics that are stored, mean the authors' sites by default."""
    config = context.config
    if among_published(config.sites) is not None:
        return config
    entry = kind_of(context.run.source).entry
    has_operators = entry is not None and published_architecture(entry) == entry
    is_default = context.sources.get("sites", "default") == "default"
    if is_default and (has_operators or config.statistics == "stored"):
        return config.model_copy(update={"sites": PUBLISHED})
    if config.statistics == "stored":
        raise ConfigError(
            f"--sites {config.sites} with --statistics stored: a checkpoint stores those of the authors' sites only",
            hint=f"choose among them: --sites {PUBLISHED}:{config.sites}",
        )
    return config


def sites_of_rule(context: RunContext[CalibrateConfig], model: nn.Module, images: Tensor) -> list[Site]:
    if among_published(context.config.sites) is None:
        return find_sites(model, images)
    files = published_files_of(kind_of(context.run.source).entry)
    return published_sites(model, images, held_by_weights(context), files)


def held_by_weights(context: RunContext) -> PublishedCheckpoint | None:
    """The published operators in the run's weights, if these are a file that has them."""
    if kind_of(context.run.source).entry is None or len(context.weights) != 1:
        return None
    return read_published(context.weights[0], allow_pickle=context.config.allow_pickle)
