"""Reports: one YAML a stage, with its inputs by sha256, and a hash of its own content.

The four reports form a chain: each names the report before it (and every other file it read) by sha256, and is refused
when a byte of it changed since. Accuracies are fractions in [0, 1]. Layout of every report:

    schema          "meansparse/<stage>/1"
    config          the resolved settings, each with where its value came from (flag, file, default)
    inputs          file -> sha256, of what the stage read
    outputs         file -> sha256, of what it wrote beside the report
    results         what the stage found
    provenance      versions, device, platform, seconds, finished (the only part that differs between equal runs)
    content_sha256  over all of the above
"""

import hashlib
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from ..errors import ArtifactError
from ..files import set_aside, sha256_of, write_bytes
from ..foreign import read_yaml, reading
from ..settings.commands import COMMANDS

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_NOT_IN_REPORT = {"run", "allow_pickle", "allow_code", "finish"}
_NOT_IN_RESULT = _NOT_IN_REPORT | {
    "device",
    "workers",
    "data_dir",
    "model",
    "from_file",
    "compile",
    "channels_last",
    "pool",
    "shard",
}
"""Settings that change how fast or where a result is computed, not which; of a ``pool``, the content is an input."""
_ONLY_IF_GIVEN = {"class_order", "weights_key", "defence", "base", "draws", "find_eps", "shape"}
PARTS = ("config", "inputs", "outputs", "results", "provenance")
STAGES = ("fetch", "calibrate", "sweep-alpha", "evaluate", "measure")


class RunPaths:
    """Every file name of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.statistics = folder / "statistics.safetensors"
        self.checkpoint = folder / "meansparse.safetensors"
        self.curve_png = folder / "sweep-alpha.png"
        self.curve_svg = folder / "sweep-alpha.svg"
        self.outcomes = folder / "outcomes.npz"
        self.state = folder / "state"

    def report(self, stage: str) -> Path:
        return self.folder / f"{stage}.yaml"


def stage_command(
    stage: str, folder: Path, name: str | None = None, shard: str | None = None, *, model: str = ""
) -> str:
    """What a user types for a stage of the run in ``folder``, or for an evaluation, a measurement or a shard in it."""
    options = [word for key, value in (("name", name), ("shard", shard)) if value for word in (f"--{key}", value)]
    return f"meansparse {stage}{model} {shlex.join(['--run', str(folder), *options])}"


def write_report(
    path: Path,
    *,
    stage: str,
    config: dict[str, Any],
    results: dict[str, Any],
    seconds: float,
    inputs: dict[str, str] | None = None,
    outputs: dict[str, str] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write a report atomically, and its copy, and return it."""
    report: dict[str, Any] = {
        "schema": f"meansparse/{stage}/{SCHEMA_VERSION}",
        "config": config,
        "inputs": inputs or {},
        "outputs": outputs or {},
        "results": results,
        "provenance": _provenance(device, seconds),
    }
    report["content_sha256"] = _content_hash(report)
    header = f"# meansparse {stage}: written by the tool; the hash at the end covers every value above it\n"
    text = header + yaml.safe_dump(report, sort_keys=False, allow_unicode=True, width=120)
    for file in (copy_of(path), path) if stage in STAGES else (path,):
        if file.is_dir():
            set_aside(file)
        write_bytes(file, text.encode())
    return report


def copy_of(path: Path) -> Path:
    """Where the same bytes lie once more, for the night when ``path`` is damaged."""
    return path.parent / "state" / "reports" / path.name


def read_report(path: Path, stage: str, *, mend: str) -> dict[str, Any]:
    """A report; refused where it is missing, damaged, edited, or of another schema; ``mend``: what writes it anew."""
    if not os.path.lexists(path):
        raise ArtifactError(f"no {path.name} in {path.parent}", hint=f"run: {_mending(path, stage, mend)}")
    try:
        return _read(path, stage)
    except ArtifactError as damage:
        hint = f"write it again, from what is kept: {_mending(path, stage, mend)}"
        raise ArtifactError(damage.message, hint=hint) from damage


def own_report(path: Path, stage: str) -> dict[str, Any] | None:
    """What an earlier session of ``stage`` itself wrote; put back from its copy, or set aside, where it is damaged."""
    found = _whole(path, stage)
    if found is None and stage in STAGES:
        if os.path.lexists(path):
            log.warning(f"{path} is damaged: set aside as {set_aside(path).name}")
        found = _whole(copy_of(path), stage)
        if found is not None:
            write_bytes(path, copy_of(path).read_bytes())
            log.warning(f"{path} is put back from its copy")
    return found


def _read(path: Path, stage: str) -> dict[str, Any]:
    """A whole report, or what is wrong with it."""
    report = read_yaml(path, ArtifactError)
    if not isinstance(report, dict) or report.get("schema") != f"meansparse/{stage}/{SCHEMA_VERSION}":
        found = report.get("schema") if isinstance(report, dict) else type(report).__name__
        raise ArtifactError(f"{path}: schema is {found!r}, expected 'meansparse/{stage}/{SCHEMA_VERSION}'")
    with reading(ArtifactError, f"{path} is no report"):
        is_as_written = report.get("content_sha256") == _content_hash(report)
    if not is_as_written or not all(isinstance(report.get(part), dict) for part in PARTS):
        raise ArtifactError(f"{path} was changed after it was written: its content_sha256 no longer fits")
    return report


def _whole(path: Path, stage: str) -> dict[str, Any] | None:
    with suppress(ArtifactError):
        return _read(path, stage) if path.is_file() else None
    return None


def _mending(path: Path, stage: str, mend: str) -> str:
    """``mend`` with the options that the report was made with, as its copy has them."""
    if stage not in STAGES:  # a training has no copy of its report: it goes on from its state, or begins anew
        return f"{mend} --fresh"
    report = _whole(copy_of(path), stage) or _whole(path, stage)
    words = shlex.split(mend)
    if report is not None:
        words = with_options(mend, stage, report["config"]["settings"], report["config"].get("from", ()))
    elif words[1:2] == ["fetch"] and "--model" not in words:
        words += ["--model", "NAME"]
    return shlex.join(words)


def with_options(command: str, stage: str, settings: dict[str, Any], given: Iterable[str]) -> list[str]:
    """The words of ``command`` with an option for each of ``given`` that it lacks."""
    words, fields = shlex.split(command), COMMANDS[stage].settings.model_fields
    for key in (key for key in fields if key in given and key in settings):
        option, value = f"--{key.replace('_', '-')}", settings[key]
        is_default = value is None or (value is False and fields[key].default is False)
        if is_default or option in words or key in _NOT_IN_REPORT:
            continue
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif key == "alphas":
            words += [option, ",".join(map(str, value))]
        else:
            words += [word for one in (value if isinstance(value, list) else [value]) for word in (option, str(one))]
    return words


def done_before(stage: str, report: dict[str, Any], config: BaseModel, inputs: dict[str, str]) -> str:
    """ "" where ``report`` is that of ``stage`` with these settings and inputs; else what differs, in words."""
    before, now = report["config"]["settings"], config.model_dump(mode="json")
    is_exact = stage == "calibrate" and now.get("estimator") == "pooled"  # whatever the batches
    skip = _NOT_IN_RESULT | ({"batch_size"} if is_exact or now.get("batch_size") == "auto" else set())
    if now.get("precision", "") is None:  # left to the device: done is done, on whichever that was
        skip = skip | {"precision"}
    changed = [key for key in now if key not in skip and before.get(key) != now[key]]
    if not changed and report["inputs"] == inputs:
        return ""
    other = ", ".join(name for name in inputs if report["inputs"].get(name) != inputs[name]) or "its inputs"
    what = ", ".join(f"{key}: {before.get(key)} -> {now[key]}" for key in changed) or other
    more = changed == ["n_examples"] and stage != "calibrate"  # whose state goes with the pass that it belongs to
    kept = "what is done of it is kept" if more else "the report is replaced once this is done"
    return f"{stage}: was done before with other settings ({what}); {kept}"


def config_block(config: BaseModel, sources: dict[str, str]) -> dict[str, Any]:
    """The settings of a stage for its report, and where those that are no defaults came from."""
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in _NOT_IN_REPORT}
    settings = {k: v for k, v in settings.items() if v is not None or k not in _ONLY_IF_GIVEN}
    return {"settings": settings, "from": {k: v for k, v in sources.items() if k in settings and v != "default"}}


def plain(value: Any) -> Any:
    """Only what YAML and JSON know: no tuples, paths or numpy numbers."""
    return to_jsonable_python(value, fallback=lambda number: number.item())


def verify_outputs(report: dict[str, Any], folder: Path, *, mend: str) -> None:
    """Refuse a stage whose files are gone or are not the ones its report describes."""
    for path, what in _damaged(report, folder):
        stage = report["schema"].split("/")[1]
        raise ArtifactError(f"{path} {what}", hint=f"run: {_mending(folder / f'{stage}.yaml', stage, mend)}")


def mend_outputs(report: dict[str, Any], folder: Path) -> bool:
    """Whether files of a stage have to be written again; what is in the place of one is set aside."""
    damaged = list(_damaged(report, folder))
    for path, what in damaged:
        log.warning(f"{path} {what}: written again")
        if path.is_dir():
            set_aside(path)
    return bool(damaged)


def _damaged(report: dict[str, Any], folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file that is not the one its report describes, and what is wrong with it."""
    for name, expected in report["outputs"].items():
        path = folder / name
        if not path.is_file():
            yield path, "is a folder" if path.is_dir() else "is missing"
        elif sha256_of(path) != expected:
            yield path, "is not the file that was written (sha256 differs)"


def _content_hash(report: dict[str, Any]) -> str:
    body = {key: value for key, value in report.items() if key != "content_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()


def _provenance(device: str, seconds: float) -> dict[str, Any]:
    gpu = {}
    if device.startswith("cuda"):
        import torch

        gpu = {"gpu": torch.cuda.get_device_name(device)}
    return {
        "versions": versions(),
        "device": device,
        **gpu,
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "command": shlex.join(["meansparse", *sys.argv[1:]]),
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine_of(provenance: dict[str, Any]) -> str:
    """The machine behind a report, in words.

    >>> machine_of({"device": "cpu", "platform": "Linux x86_64, 2 cores"})
    'cpu (Linux x86_64, 2 cores)'
    """
    return f"{provenance.get('gpu', provenance['device'])} ({provenance['platform']})"


def versions() -> dict[str, str]:
    """Of everything that a result can depend on."""
    packages = ("meansparse", "torch", "robustbench", "pyautoattack", "numpy")
    return {name: _version(name) for name in packages} | {"python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
