"""``meansparse calibrate``: mean and standard deviation of each channel at each site, in one pass over images."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.examples import stack_examples
from ..data.splits import Split, take_examples
from ..errors import ConfigError, DataError
from ..files import discard
from ..ledger import Ledger
from ..models.published_checkpoint import PublishedCheckpoint
from ..operator.calibration import PassState, calibrate_channels, statistics_of
from ..operator.checkpoint import Checkpoint, save_checkpoint
from ..operator.shared_pass import SharedPass
from ..operator.statistics import ChannelStatistics
from ..reporting.console import console, live, note
from ..reporting.model_tables import show_sites
from ..runs.context import RunContext
from ..runs.operators import check_model
from ..settings.shard import Shard, read_shard
from ..settings.stages import CalibrateConfig
from ..sites.find import Site
from ..sites.rules import chosen_by, select_sites
from .fetch import ensure_fetched
from .gather import begin_shard, forget_shards, mend, missing_shards, shard_done, shards_begun
from .plan import plan_pass
from .sites import held_by_weights, sites_of_rule, with_site_rule

log = logging.getLogger(__name__)

OF_SITE = ("index", "name", "operation", "kind", "layout", "channels", "gate", "after_addition", "main_path")


def calibrate(config: CalibrateConfig, sources: dict[str, str], *, fresh: bool = False) -> Path | None:
    """``statistics.safetensors`` and ``calibrate.yaml``, from images or as a published checkpoint stores them."""
    ensure_fetched(config, sources)
    context = RunContext("calibrate", config, sources, fresh=fresh)
    context.config = config = with_site_rule(context)
    images = chosen_images(config, context.split("calibration")) if config.statistics == "measured" else None
    context.settle("fetch", images)
    if done := context.done(whole=True):
        return done
    if images is None and config.shard is not None:
        raise ConfigError("--shard with --statistics stored: no images are read", hint="leave --shard out")
    return _take_stored(context) if images is None else _measure(context, images)


def _measure(context: RunContext[CalibrateConfig], images: Split) -> Path | None:
    config = context.config
    model = context.base(config.sites)
    first = stack_examples(take_examples(images, min(len(images), 4)))[0].to(context.device)
    check_model(context, model, images, first)
    found = sites_of_rule(context, model, first)
    sites = select_sites(found, config.sites, include_gates=config.include_gates)
    console.print(show_sites(found, chosen_by(found, config.sites, include_gates=config.include_gates)))
    fingerprint = context.inputs | {
        "batch_size": context.batch_size,
        "estimator": config.estimator,
        "sites": [s.name for s in sites],
        "preprocessing": repr(context.preprocessing),
    }
    if config.plan:
        plan_pass(context, model, sites, images)
        return None
    work = _Pass(context, model, sites, images, fingerprint)
    if config.shard is not None:
        return work.shard(read_shard(config.shard))
    statistics = work.gathered() if shards_begun(context, work.folder) and not context.fresh else work.alone()
    checkpoint = Checkpoint(tuple(sites), tuple(statistics), config.estimator, rule=config.sites)
    report = _write(context, found, checkpoint, {"n_images": len(images), "estimator": config.estimator})
    work.forget()
    note(f"calibrate: {len(sites)} sites, {len(images):,} images, {time.monotonic() - context.started:.1f} s")
    return report


@dataclass(frozen=True)
class _Pass:
    """``images`` through ``model``, by this process alone or by shards; ``fingerprint``: what the sums depend on."""

    context: RunContext[CalibrateConfig]
    model: nn.Module
    sites: list[Site]
    images: Split
    fingerprint: dict[str, Any]

    @property
    def folder(self) -> Path:
        """What shards have made."""
        return self.context.run.paths.state / "calibrate"

    @property
    def own_state(self) -> Path:
        """What a process alone has made."""
        return self.context.run.paths.state / "calibrate.pt"

    def forget(self) -> None:
        """Remove what is of no use once the statistics are there."""
        self.own_state.unlink(missing_ok=True)
        discard(self.folder)
        forget_shards(self.context.run, "calibrate")

    def alone(self) -> list[ChannelStatistics]:
        config = self.context.config
        if self.context.fresh:
            self.forget()
        with live() as view:
            view.begin("statistics", len(self.images), work=(len(self.images), 0))
            return calibrate_channels(
                self.model,
                self.sites,
                self.images,
                batch_size=self.context.batch_size,
                estimator=config.estimator,
                n_workers=config.workers,
                state=PassState(self.own_state, self.fingerprint),
                on_batch=view.advance,
            )

    def shard(self, shard: Shard) -> Path:
        begin_shard(self.context, self.folder)
        shared = self._shared(shard.name)
        pieces = shard.positions(len(shared.pieces))
        self._make(shared, shared.missing(pieces), f" (shard {self.context.config.shard})")
        n_images = sum(len(shared.pieces[piece]) for piece in pieces)
        return shard_done(self.context, n_images, len(self.images))

    def gathered(self) -> list[ChannelStatistics]:
        """The statistics, from what shards have made; with ``--finish`` what they lack is made here."""
        shared = self._shared(None)
        if self.context.config.finish:
            self._make(shared, shared.missing())
        if undone := shared.missing():
            begun, sizes = shards_begun(self.context, self.folder), [len(piece) for piece in shared.pieces]
            raise missing_shards(self.context, begun, sizes, undone, "images")
        return statistics_of(self.sites, shared.merged())

    def _shared(self, writer: str | None) -> SharedPass:
        ledger = Ledger(self.folder, self.fingerprint, writer=writer, mend=mend, note=log.warning)
        return SharedPass(ledger, self.images, self.context.batch_size)

    def _make(self, shared: SharedPass, pieces: list[int], part: str = "") -> None:
        config = self.context.config
        with live() as view:
            view.begin(f"calibrating{part}", sum(len(shared.pieces[piece]) for piece in pieces))
            for piece in pieces:
                shared.make(
                    piece,
                    self.model,
                    self.sites,
                    estimator=config.estimator,
                    n_workers=config.workers,
                    on_batch=view.advance,
                )


def chosen_images(config: CalibrateConfig, images: Split) -> Split:
    """As many images of the calibration split as the settings ask for; all of them where they do not say."""
    if config.fraction is not None and config.n_examples is not None:
        raise ConfigError("both --fraction and --n-examples were given", hint="give one of them")
    n = config.n_examples if config.fraction is None else max(1, round(config.fraction * len(images)))
    if not len(images):
        raise DataError("the calibration split is empty", hint="is this the folder of a data set? --data-dir DIR")
    return take_examples(images, n, seed=config.seed)


def _take_stored(context: RunContext[CalibrateConfig]) -> Path:
    """Without images: the operators that a published checkpoint holds are taken as they are, alpha included."""
    config, held = context.config, _stored_operators(context)
    model, shape = context.base(config.sites, device="cpu"), context.image_shape
    assert shape is not None  # a published checkpoint is one of a known data set
    found = sites_of_rule(context, model, torch.rand((2, *shape)))
    sites = select_sites(found, config.sites)
    console.print(show_sites(found, chosen_by(found, config.sites)))
    statistics = tuple(held.statistics[str(held.path_of(site.path))] for site in sites)
    checkpoint = Checkpoint(tuple(sites), statistics, "published", held.alpha, rule=config.sites)
    known = held.file
    about = None if known is None else {"name": known.name, "file": known.file_name, "alpha": known.alpha}
    stored = {"n_images": 0, "estimator": "published", "statistics": "stored", "alpha": held.alpha}
    report = _write(context, found, checkpoint, stored | {"published_model": about})
    alpha = "no alpha that all of them share" if held.alpha is None else f"alpha {held.alpha:g}"
    note(f"calibrate: {len(sites)} sites with the statistics of {known.file_name if known else 'the weights'}, {alpha}")
    if held.alpha is None:
        theirs = f"the authors evaluate at {known.alpha:g}: " if known else ""
        note(f"{theirs}choose one with sweep-alpha, or give it: {context.run.command('evaluate')} --alpha A")
    return report


def _stored_operators(context: RunContext) -> PublishedCheckpoint:
    held = held_by_weights(context)
    if held is None:
        raise ConfigError(
            f"the weights of {context.run.source.name} hold no MeanSparse operators, "
            "so no statistics are stored in them",
            hint="measure them: leave --statistics out",
        )
    if not any(bool(s.std.any()) for s in held.statistics.values()):
        raise ConfigError(
            "the statistics that the weights hold are all zero", hint="measure them: leave --statistics out"
        )
    return held


def _write(
    context: RunContext[CalibrateConfig], found: list[Site], checkpoint: Checkpoint, about: dict[str, Any]
) -> Path:
    """The statistics, and the report about them; ``found``: every site, ``about``: where the statistics are from."""
    config, file, is_measured = context.config, context.run.paths.statistics, about["n_images"] > 0
    save_checkpoint(file, checkpoint)
    rows = zip(checkpoint.sites, checkpoint.statistics, strict=True)
    results = about | {
        "rule": config.sites,
        "n_sites_found": len(found),
        "n_gates_left_out": sum(site.gate for site in found) if is_measured and not config.include_gates else 0,
        "sites": [{key: getattr(site, key) for key in OF_SITE} | {"count": part.count} for site, part in rows],
    }
    if unseen := getattr(found, "unseen", ()):
        results["code_not_seen"] = list(unseen)
    return context.write([file], results, device=None if is_measured else "cpu")
