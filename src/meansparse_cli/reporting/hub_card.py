"""``README.md`` for the Hub: the header that it reads, how the model is loaded, and the report."""

from pathlib import Path

from ..models.names import ModelSource
from .render import markdown, outdated, read_run, results_of
from .template import fill


def hub_card(folder: Path, source: ModelSource, norm: str, file: str) -> str:
    """The card of the run in ``folder``, whose exported model is called ``file``; without figures where none are."""
    reports = read_run(folder)
    return fill(
        __package__,
        "hub_card.md",
        name=file.removesuffix(".safetensors"),
        source=source.name,
        dataset=Path(source.dataset).stem,
        norm=norm,
        file=file,
        comparisons=results_of(reports, "evaluate").get("comparisons", ()),
        report=markdown(reports, outdated(reports, folder)),
    )
