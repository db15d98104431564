"""Shards that are put together: who has what is missing."""

import shlex
import socket
import time
from collections.abc import Callable, Collection, Sequence
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


def say_begun(context: RunContext[Any]) -> None:
    """For whoever gathers: where and when this shard was last at work."""
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = {"host": socket.gethostname(), "begun": begun}
    write_json(context.place.paths.folder / _begun_name(context.stage), content)


def begin_shard(context: RunContext[Any], state_folder: Path) -> None:
    """``say_begun``, once what this shard wrote before is thrown away, if ``--fresh`` says so."""
    if context.fresh:
        for file in read_shard(context.config.shard).files_in(state_folder):
            file.unlink()
    say_begun(context)


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
    context: RunContext[Any], begun: Sequence[Shard], sizes: Sequence[int], undone: Collection[int], unit: str
) -> ArtifactError:
    """What is ``undone`` of the parts of a whole, dealt out one by one: by the shard that has it, and two ways on.

    ``sizes``: how many ``unit`` each part is of.
    """
    count, stage, folder = begun[-1].count, context.stage, context.whole.paths.folder
    left: dict[int, str] = {}
    for shard in [Shard(number, count) for number in range(1, count + 1)]:
        own = shard.positions(len(sizes))
        if n_left := sum(sizes[part] for part in own if part in undone):
            n, last = sum(sizes[part] for part in own), _begun(folder / "shards" / shard.name / _begun_name(stage))
            left[shard.number] = f"  shard {shard.number}/{count}: {n_left} of {n} {unit} are not done; {last}"
    given = [key for key, source in context.sources.items() if source != "default"]
    words = with_options(context.run.command(stage), stage, context.config.model_dump(mode="json"), given)
    words[2:2] = [str(context.config.file)] if "file" in given else []
    command = shlex.join(words)
    n_missing = sum(sizes[part] for part in undone)
    return ArtifactError(
        "\n".join([f"{n_missing} of {sum(sizes)} {unit} are not done by the shards in {folder}:", *left.values()]),
        hint=f"finish each shard, or bring its files here: {command} --shard {min(left)}/{count}\n"
        f"or do the rest in this job: {command} --finish",
    )


def mend(writer: str | None) -> str:
    """How a user throws away what ``writer``, a shard or a command alone, made with other settings."""
    if writer is None:
        return "add --fresh to throw away what was made, and start anew"
    return f"do that shard anew with these settings (--shard {shard_of(writer)} --fresh), or start anew: --fresh"


def gather_blocks(context: RunContext[Any], blocks: Sequence[Tensor], is_missing: Callable[[int], bool]) -> None:
    """Nothing where no shard left a block of images undone, or ``--finish`` does it here; else ``missing_shards``."""
    begun = shards_begun(context)
    undone = {b for b in range(len(blocks)) if is_missing(b)} if begun and not context.config.finish else set()
    if undone:
        raise missing_shards(context, begun, [len(block) for block in blocks], undone, "images")


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
    """The blocks that the shard of ``context`` has; how many images they hold.

    ``n_grids``: how many grids of the same images are to be scored, this one and those after it.
    """
    own = read_shard(context.config.shard).positions(len(grid.blocks))
    if context.fresh:
        grid.forget(own)
    n_images = sum(len(grid.blocks[b]) for b in own)
    score_blocks(grid, variants, own, what, further=n_images * (n_grids - 1))
    return n_images


def shard_done(context: RunContext[Any], n_images: int, n_all: int, unit: str = "images") -> Path:
    """The report of a shard whose work lies in the state of the whole."""
    shard = f"{context.stage} (shard {context.config.shard})"
    note(f"{shard}: {n_images:,} of {n_all:,} {unit}; the command without it gathers all")
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
