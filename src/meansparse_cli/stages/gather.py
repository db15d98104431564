"""Shards that are put together: who has what is missing."""

import shlex
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..engine.grid import Variant, VariantGrid
from ..errors import ArtifactError
from ..files import discard, read_json, write_json
from ..reporting.console import live, note
from ..runs.context import RunContext
from ..runs.folder import Run
from ..runs.report import copy_of, with_options
from ..selection.sweep import in_full
from ..settings.shard import Shard, read_shard, shard_of

Share = Callable[[Shard], tuple[int, int]]
"""How much of its share a shard has left, and how much that share is."""


def say_begun(context: RunContext[Any]) -> None:
    """For whoever gathers: where and when this shard was last at work."""
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = {"host": socket.gethostname(), "begun": begun}
    write_json(context.place.paths.folder / _begun_name(context.stage), content)


def _begun_name(stage: str) -> str:
    return f"begun-{stage}.json"


def shards_begun(context: RunContext[Any], state_folder: Path | None = None) -> list[Shard]:
    """The shards that have begun this stage: that said so, or left settings in a ledger in ``state_folder``."""
    said = (context.whole.paths.folder / "shards").glob(f"*/{_begun_name(context.stage)}")
    names = {file.parent.name for file in said}
    if state_folder is not None:
        names |= {file.name.removesuffix("-settings.json") for file in state_folder.rglob("shard-*-settings.json")}
    return sorted((read_shard(shard_of(name)) for name in names), key=lambda shard: (shard.count, shard.number))


def missing_shards(
    context: RunContext[Any], begun: Sequence[Shard], share: Share, unit: str = "examples"
) -> ArtifactError:
    """What is missing of the whole, counted in ``unit``, by the shard that has it, and two ways on."""
    count = begun[-1].count
    lines, n_missing, n_all = [], 0, 0
    for shard in [Shard(number, count) for number in range(1, count + 1)]:
        n_left, n = share(shard)
        n_missing, n_all = n_missing + n_left, n_all + n
        if n_left:
            last = _begun(context.whole.paths.folder / "shards" / shard.name / _begun_name(context.stage))
            lines.append(f"shard {shard.number}/{count}: {n_left} of {n} {unit} are not done; {last}")
    first = lines[0].split(":")[0].removeprefix("shard ")
    given = [key for key, source in context.sources.items() if source != "default"]
    stage = context.stage
    words = with_options(context.whole.command(stage), stage, context.config.model_dump(mode="json"), given)
    command = shlex.join(words)
    return ArtifactError(
        f"{n_missing} of {n_all} {unit} are not done by the shards in {context.whole.paths.folder}:\n"
        + "\n".join(f"  {line}" for line in lines),
        hint=f"finish each shard, or bring its files here: {command} --shard {first}\n"
        f"or do the rest in this job: {command} --finish",
    )


def every_nth(missing: Sequence[bool]) -> Share:
    """Of a whole whose parts are dealt out one by one; ``missing`` (n,): what is not done."""

    def share(shard: Shard) -> tuple[int, int]:
        positions = shard.positions(len(missing))
        return sum(bool(missing[position]) for position in positions), len(positions)

    return share


def gather_blocks(context: RunContext[Any], blocks: Sequence[Tensor], is_missing: Callable[[int], bool]) -> None:
    """Nothing where no shard left a block of images undone, or ``--finish`` does it here; else ``missing_shards``."""
    begun = shards_begun(context)
    undone = {b for b in range(len(blocks)) if is_missing(b)} if begun and not context.config.finish else set()

    def share(shard: Shard) -> tuple[int, int]:
        own = shard.positions(len(blocks))
        return sum(len(blocks[b]) for b in own if b in undone), sum(len(blocks[b]) for b in own)

    if undone:
        raise missing_shards(context, begun, share, "images")


def score_blocks(
    grid: VariantGrid, variants: Sequence[Variant], blocks: Sequence[int], what: str = "", *, further: int = 0
) -> None:
    """Every attack at ``variants`` on the images of ``blocks``; ``further``: images that come after these."""
    after = sum(len(grid.blocks[b]) for b in blocks) + further
    with live("pairs") as view:
        grid.classify(variants, blocks)
        for b in blocks:
            after -= len(grid.blocks[b])
            grid.tell(partial(view.begin, work=(len(grid.blocks[b]), after)), view.advance)
            grid.score(b, in_full(variants), what)


def score_shard(
    context: RunContext[Any], grid: VariantGrid, variants: Sequence[Variant], what: str = "", *, n_grids: int = 1
) -> int:
    """Those blocks that the shard of ``context`` has, with ``--fresh`` from nothing; how many images they hold.

    ``n_grids``: how many grids of the same images are to be scored, this one and those after it.
    """
    own = read_shard(context.config.shard).positions(len(grid.blocks))
    if context.fresh:
        grid.forget(own)
    n_images = sum(len(grid.blocks[b]) for b in own)
    score_blocks(grid, variants, own, what, further=n_images * (n_grids - 1))
    return n_images


def shard_done(context: RunContext[Any], n_images: int, n_all: int) -> Path:
    """The report of a shard whose work lies in the state of the whole."""
    shard = f"{context.stage} (shard {context.config.shard})"
    note(f"{shard}: {n_images:,} of {n_all:,} images; the command without it gathers all")
    return context.write([], {"shard": context.config.shard, "n_images": n_images})


def forget_shards(whole: Run, stage: str) -> None:
    """Remove what shards have reported of a stage, once the report of the whole is there or they are begun anew."""
    for place in (whole.paths.folder / "shards").glob("*"):
        report = place / f"{stage}.yaml"
        for file in (report, copy_of(report), place / _begun_name(stage)):
            file.unlink(missing_ok=True)


def begin_anew(whole: Run, stage: str) -> None:
    """Throw away all that was done of a stage, its report too, before workers start."""
    state, report = whole.paths.state, whole.paths.report(stage)
    discard(state if stage == "measure" else state / stage)
    forget_shards(whole, stage)
    for file in (state / f"{stage}.pt", report, copy_of(report)):
        file.unlink(missing_ok=True)


def _begun(file: Path) -> str:
    try:
        content = read_json(file)
        return f"begun on host {content['host']}, {content['begun']}"
    except (ArtifactError, KeyError):
        return "never begun in this folder"
