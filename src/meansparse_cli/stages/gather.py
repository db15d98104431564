"""Shards that are put together: who has what is missing."""

import shlex
import socket
import time
from pathlib import Path

from torch import Tensor

from ..errors import ArtifactError
from ..files import read_json, write_json
from ..runs.context import RunContext
from ..runs.report import with_options
from ..settings.shard import Shard, read_shard
from ..settings.stages import EvaluateConfig

BEGUN = "begun.json"


def say_begun(place: Path) -> None:
    """For whoever gathers: where and when a shard was last at work."""
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(place / BEGUN, {"host": socket.gethostname(), "begun": begun})


def shards_in(state_folder: Path) -> list[Shard]:
    """The shards that have begun in the state of an evaluation, at whichever eps."""
    names = {file.name.removesuffix("-settings.json") for file in state_folder.rglob("shard-*-settings.json")}
    shards = [read_shard(name.removeprefix("shard-").replace("-of-", "/")) for name in names]
    return sorted(shards, key=lambda shard: (shard.count, shard.number))


def missing_shards(context: RunContext[EvaluateConfig], state_folder: Path, missing: Tensor) -> ArtifactError:
    """What is ``missing`` (n,) of the outcomes of the whole, by the shard that has it, and two ways on."""
    count = shards_in(state_folder)[-1].count
    lines = []
    for shard in [Shard(number, count) for number in range(1, count + 1)]:
        positions = list(shard.positions(len(missing)))
        if n_left := int(missing[positions].sum()):
            begun = _begun(context.whole.paths.folder / "shards" / shard.name / BEGUN)
            lines.append(f"shard {shard.number}/{count}: {n_left} of {len(positions)} examples are not done; {begun}")
    first = lines[0].split(":")[0].removeprefix("shard ")
    given = [key for key, source in context.sources.items() if source != "default"]
    words = with_options(context.whole.command("evaluate"), "evaluate", context.config.model_dump(mode="json"), given)
    command = shlex.join(words)
    return ArtifactError(
        f"{int(missing.sum())} of {len(missing)} examples are not done by the shards in {state_folder}:\n"
        + "\n".join(f"  {line}" for line in lines),
        hint=f"finish each shard, or bring its files here: {command} --shard {first}\n"
        f"or attack the rest in this job: {command} --finish",
    )


def _begun(file: Path) -> str:
    try:
        content = read_json(file)
        return f"begun on host {content['host']}, {content['begun']}"
    except (ArtifactError, KeyError):
        return "never begun in this folder"
