"""The model of a stage: found to fit its images, with the calibrated operators and the alpha in use."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.problem import Budget, Problem
from ..data.examples import Examples
from ..data.splits import Split, SplitName, check_images
from ..engine.grid import VariantGrid
from ..errors import ArtifactError, ConfigError, DataError, MeanSparseError
from ..files import sha256_of
from ..models.export import load_exported
from ..operator.checkpoint import Checkpoint, load_checkpoint, sparsify
from ..operator.device import Precision, precision_on
from ..operator.insertion import SparsifiedModel
from ..settings.stages import (
    OPERATOR_OPTIONS,
    EvaluateConfig,
    OperatorConfig,
    StageConfig,
    SweepAlphaConfig,
    VerifyConfig,
)
from ..settings.values import eps_value
from ..sites.foreign import forward_failed
from ..sites.rules import among_published, select_sites
from .context import RunContext
from .defence import NamedDefence

Names = tuple[str, ...]
DEFAULT_OPTIONS = ("all", "channel-mean", "channel-std", None)


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
    need code to load. ``allow_code``: import the ``module:factory`` that the file names as its network, or a run
    that you did not fetch yourself.
    """
    if Path(run).is_file():
        return load_exported(Path(run), alpha=alpha, device=device, allow_code=allow_code)
    context = RunContext("load", StageConfig(run=Path(run), allow_pickle=allow_pickle, allow_code=allow_code))
    checkpoint = checkpoint_in_use(context, alpha)
    return sparsify(context.base(checkpoint.rule, device=device), checkpoint, alpha=alpha)


def problem_of(
    context: RunContext,
    checkpoint: Checkpoint | NamedDefence,
    examples: Examples,
    eps: str,
    *,
    alpha: float = 0.0,
    precision: Precision | None = None,
) -> Problem:
    """The sparsified model at ``alpha`` and a budget, once model, examples and classes are found to fit together."""
    base, config = context.base(checkpoint.rule), context.config
    n_classes = check_model(context, base, context.split("test"), examples.x[:2].to(context.device))
    return Problem(
        checkpoint.applied(base, alpha),
        Budget(context.run.norm, eps_value(eps)),  # type: ignore[arg-type]
        n_classes,
        config.seed,
        context.batch_size,
        precision_on(context.device, precision),
    )


def check_model(context: RunContext, model: nn.Module, images: Split, batch: Tensor) -> int:
    """How many classes the model knows: as many as ``images`` have, whose size must be the model's.

    ``batch`` (n, channels, height, width) goes through the model, once. Raises DataError where that fails or does not
    fit.
    """
    shape = context.image_shape or tuple(batch.shape[1:])
    name = context.named_dataset
    check_images(images, images.dataset.n_classes, shape, name)  # type: ignore[attr-defined]
    n_classes = count_classes(model, batch)
    check_images(images, n_classes, shape, name)
    return n_classes


def count_classes(model: nn.Module, batch: Tensor) -> int:
    """How many logits the model gives an image; DataError where its forward pass fails or gives anything else."""
    with torch.no_grad():
        try:
            logits = model(batch)
        except MeanSparseError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise forward_failed(error, f"on images of shape {tuple(batch.shape)}") from error
    if logits.ndim != 2 or len(logits) != len(batch):
        raise DataError(f"the model gives {tuple(logits.shape)} for {len(batch)} images; expected (batch, classes)")
    return int(logits.shape[1])


def split_note(split: SplitName) -> str | None:
    """What has to be said about accuracies on another split than the test split."""
    if split == "test":
        return None
    why = {
        "calibration": "training images, which the statistics were computed from",
        "held-out": "training images that sweep-alpha may have chosen alpha on",
    }[split]
    return f"NOT TEST IMAGES: accuracies on the {split} split, {why}"


def open_grid(
    context: RunContext, problem: Problem, examples: Examples, families: tuple[Names, Names], folder: Path, **key: str
) -> VariantGrid:
    """Every cell that a sweep or a measurement, or one before it, has scored in ``folder``.

    ``families``: plain and BPDA attacks; ``key``: what outcomes depend on besides statistics, weights and attacks.
    """
    plain, bpda = families
    statistics = sha256_of(context.run.paths.statistics)
    return VariantGrid(
        problem,
        examples,
        plain=plain,
        bpda=bpda,
        folder=folder,
        block_size=context.config.block_size,
        key={"statistics": statistics, "weights": context.weights_id, **key},
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


def swept_alpha(context: RunContext) -> float | None:
    """What a sweep chose; None where there was none, or one of other statistics than are there now."""
    with suppress(ArtifactError):
        return float(context.verified("sweep-alpha")["results"]["alpha"]) if context.has("sweep-alpha") else None
    return None


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


def operator_options(config: OperatorConfig) -> dict[str, Any]:
    """What the settings say of a ``Checkpoint`` besides its sites."""
    return {"centre": config.centre, "spread": config.spread, "shape": config.shape or "hard"}


def with_options(statistics: Checkpoint, config: SweepAlphaConfig | EvaluateConfig | VerifyConfig) -> Checkpoint:
    """The statistics with the sites and the options that the settings ask for."""
    weights = None
    if config.sites != "all":
        rule = among_published(config.sites) or config.sites
        used = {site.index for site in select_sites(list(statistics.sites), rule)}
        if len(used) < len(statistics.sites):
            weights = tuple(float(site.index in used) for site in statistics.sites)
    return replace(statistics, site_weights=weights, **operator_options(config))


def checkpoint_to_evaluate(context: RunContext, config: EvaluateConfig | VerifyConfig, upstream: str) -> Checkpoint:
    """What the sweep chose, sites and options included; without a sweep, the statistics as the settings say."""
    paths = context.run.paths
    if upstream == "calibrate":
        return with_options(load_checkpoint(paths.statistics), config)
    asked = tuple(getattr(config, name) for name in OPERATOR_OPTIONS)
    swept = context.verified("sweep-alpha")["config"]["settings"]
    if asked not in (DEFAULT_OPTIONS, tuple(swept.get(name) for name in OPERATOR_OPTIONS)):
        raise ConfigError(
            "--sites, --centre, --spread and --shape of evaluate go with --alpha: "
            "without it, the sweep's checkpoint decides",
            hint="give an alpha, or choose one with them: "
            f"{context.run.command('sweep-alpha')} --centre {config.centre}",
        )
    return load_checkpoint(paths.checkpoint)
