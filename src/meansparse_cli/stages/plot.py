"""``meansparse plot``: a picture of a finished sweep; of the operator itself, statistics and an alpha are enough."""

from pathlib import Path

from ..operator.checkpoint import load_checkpoint, sparsify
from ..operator.observe import blocked_shares, channel_values, site_called
from ..reporting.console import note
from ..reporting.curves import draw_alpha_curve
from ..reporting.operator_plots import draw_blocked, draw_histogram
from ..runs.context import RunContext
from ..runs.folder import file_name
from ..runs.operators import alpha_in_use
from ..settings.stages import PlotConfig


def plot(config: PlotConfig, sources: dict[str, str]) -> Path:
    """A curve of a finished sweep, or what the operator does at one alpha, into ``plots/``, PNG and SVG; the PNG."""
    context = RunContext("plot", config, sources)
    run, folder = context.run, context.run.paths.folder / "plots"
    if config.what == "curve":
        results = context.verified("sweep-alpha")["results"]
        title = f"{run.source.name}: {results['n_examples']:,} held-out images"
        draw_alpha_curve(results, title=title, png=folder / "curve.png", svg=folder / "curve.svg")
        return folder / "curve.png"
    alpha, _ = alpha_in_use(context, config.alpha)
    checkpoint = load_checkpoint(_operators_to_draw(context, config))
    model = sparsify(context.base(checkpoint.rule), checkpoint, alpha=alpha)
    clamp = context.sources.get("n_examples", "default") == "default"
    images = context.take("held-out", config.n_examples, clamp=clamp)
    x = context.examples(images).to(context.device).x
    title = f"{run.source.name}, alpha = {alpha:g}, {len(x):,} held-out images"
    if config.what == "blocked":
        shares = blocked_shares(model, x, batch_size=context.batch_size)
        draw_blocked(shares, model.sites, title=title, png=folder / "blocked.png", svg=folder / "blocked.svg")
        return folder / "blocked.png"
    site = model.sites[0] if config.site is None else site_called(model.sites, config.site)
    values = channel_values(model, site, config.channel, x, batch_size=context.batch_size)
    name = file_name(f"histogram-{site.name}-{config.channel}")
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    draw_histogram(values, title=f"{title}\n{site.name}, channel {config.channel}", png=png, svg=svg)
    return png


def _operators_to_draw(context: RunContext, config: PlotConfig) -> Path:
    """The sweep's checkpoint, with sites, centre and spread of its own; the statistics where there is none of them."""
    paths = context.run.paths
    if not context.has("sweep-alpha"):
        return paths.statistics
    if (
        config.alpha is not None
        and not context.input("calibrate").items() <= context.report("sweep-alpha")["inputs"].items()
    ):
        note(f"plot: the sweep in {paths.folder} is of other statistics; those that are there now are drawn")
        return paths.statistics
    context.verified("sweep-alpha")
    return paths.checkpoint
