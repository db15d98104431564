"""``evaluate --save-witnesses``: the images that broke an example, and a gallery of the first of them."""

from collections.abc import Mapping
from pathlib import Path

from ..engine.evaluate import EvaluationRun
from ..engine.witnesses import collect_adversarial, save_adversarial, save_external
from ..reporting.console import note
from ..reporting.gallery import draw_gallery
from ..runs.context import RunContext
from ..settings.stages import EvaluateConfig
from ..settings.values import eps_value


def keep_witnesses(
    context: RunContext[EvaluateConfig], runs: Mapping[str, EvaluationRun], eps: str, operator: str
) -> list[Path]:
    """Of the runs up to ``eps``, by their eps; the files that belong to the report."""
    up_to_this = [run for one, run in runs.items() if eps_value(one) <= eps_value(eps)]
    folder, test = context.place.paths.folder, context.split(context.config.split)
    found_on, examples = collect_adversarial(up_to_this), up_to_this[-1].cells.examples
    files = [folder / "witnesses.safetensors"]
    save_adversarial(files[0], found_on, up_to_this[-1], operator)
    for name, found in found_on.items():
        file = folder / f"witnesses-{name}.pt"
        files += [file] if save_external(file, test, found, len(examples)) else []
    clean = dict(zip(examples.indices.tolist(), examples.x.cpu(), strict=True))
    png, svg = folder / "gallery.png", folder / "gallery.svg"
    title = f"{context.run.source.name}, {operator}, {context.run.norm} {eps}: the first examples that were broken"
    for before in (png, svg):
        before.unlink(missing_ok=True)
    if draw_gallery(found_on, clean, eps_value(eps), title=title, png=png, svg=svg):
        note(f"gallery: {png}")
    return files
