"""``meansparse plot``: a picture of a finished sweep; of the operator itself, statistics and an alpha are enough."""

from __future__ import annotations

from pathlib import Path

from ..files import sha256_of
from ..operator.checkpoint import load_checkpoint, sparsify
from ..reporting.console import note
from ..runs.folder import Run, file_name, located, verified
from ..runs.images import examples
from ..runs.model import alpha_in_use, load_base, pick_device
from ..runs.report import read_report
from ..settings.stages import PlotConfig


def plot(config: PlotConfig, sources: dict[str, str]) -> Path:
    """A curve of a finished sweep, or what the operator does at one alpha, into ``plots/`` of the run folder, PNG and SVG; returns the PNG."""
    from ..operator.observe import blocked_shares, channel_values, site_called
    from ..reporting.alpha_curve import draw_alpha_curve
    from ..reporting.operator_plots import draw_blocked, draw_histogram

    run = located(config)
    folder = run.paths.folder / "plots"
    if config.what == "curve":
        results = verified(run, "sweep-alpha")["results"]
        png, svg = folder / "curve.png", folder / "curve.svg"
        draw_alpha_curve(
            results, title=f"{run.source.name}: {results['n_examples']:,} held-out images", png=png, svg=svg
        )
        return png
    device = pick_device(config.device)
    alpha, _ = alpha_in_use(run, config.alpha)
    swept = run.paths.report("sweep-alpha").exists()  # with sites, centre and spread of its own
    if swept and config.alpha is not None and not _is_of_these_statistics(run):
        swept = False
        note(f"plot: the sweep in {run.paths.folder} is of other statistics; those that are there now are drawn")
    elif swept:
        verified(run, "sweep-alpha")
    checkpoint = load_checkpoint(run.paths.checkpoint if swept else run.paths.statistics)
    model = sparsify(load_base(run, config, device, checkpoint.rule), checkpoint, alpha=alpha)
    clamp = sources.get("n_examples", "default") == "default"
    _, x, _ = examples(run, config, "held-out", config.n_examples, clamp=clamp)
    x, title = x.to(device), f"{run.source.name}, alpha = {alpha:g}, {len(x):,} held-out images"
    if config.what == "blocked":
        png, svg = folder / "blocked.png", folder / "blocked.svg"
        draw_blocked(blocked_shares(model, x, batch_size=config.batch_size), model.sites, title=title, png=png, svg=svg)
        return png
    site = model.sites[0] if config.site is None else site_called(model.sites, config.site)
    values = channel_values(model, site, config.channel, x, batch_size=config.batch_size)
    name = file_name(f"histogram-{site.name}-{config.channel}")
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    draw_histogram(values, title=f"{title}\n{site.name}, channel {config.channel}", png=png, svg=svg)
    return png


def _is_of_these_statistics(run: Run) -> bool:
    """Was the sweep made from the statistics that are there now?"""
    swept = read_report(run.paths.report("sweep-alpha"), "sweep-alpha", mend=run.command("sweep-alpha"))
    return bool(swept["inputs"]["calibrate.yaml"] == sha256_of(run.paths.report("calibrate")))
