"""The record of a stage: whether it was done already, and the report that it writes last."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import sha256_of
from ..settings.stages import ModelConfig
from .folder import Run
from .report import read_report, verify_outputs, write_report

if TYPE_CHECKING:
    from ..sites.find import Site

log = logging.getLogger(__name__)

_NOT_IN_REPORT = {"run", "allow_pickle"}
# Settings that change how fast or where a result is computed, not which result it is.
_NOT_IN_RESULT = {
    "run", "allow_pickle", "device", "workers", "data_dir", "model", "from_file", "compile", "channels_last",
    "pool",  # its content is among the inputs
}  # fmt: skip


def finished(stage: str, run: Run, config: ModelConfig, inputs: dict[str, str], fresh: bool) -> Path | None:
    """The report, if this very stage was already done with these settings and inputs."""
    path = run.paths.report(stage)
    if fresh or not path.exists():
        return None
    report = read_report(path, stage, mend=run.command(stage))
    before, now = report["config"]["settings"], plain(config.model_dump(mode="json"))
    is_exact = stage == "calibrate" and now.get("estimator") == "pooled"  # whatever the batches
    skip = _NOT_IN_RESULT | ({"batch_size"} if is_exact else set())
    if now.get("precision", "") is None:  # left to the device: done is done, on whichever that was
        skip = skip | {"precision"}
    changed = [key for key in now if key not in skip and before.get(key) != now[key]]
    if changed or report["inputs"] != inputs:
        other = ", ".join(name for name in inputs if report["inputs"].get(name) != inputs[name]) or "its inputs"
        what = ", ".join(f"{key}: {before.get(key)} -> {now[key]}" for key in changed) or other
        more = changed == ["n_examples"] and stage != "calibrate"  # whose state goes with the pass that it belongs to
        kept = "what is done of it is kept" if more else "the report is replaced once this is done"
        log.info(f"{stage}: was done before with other settings ({what}); {kept}")
        return None
    verify_outputs(report, run.paths.folder, mend=run.command(stage))
    log.info(f"{stage}: already done, nothing to do ({path}); --fresh does it again")
    return path


def write_stage(
    run: Run, stage: str, config: ModelConfig, sources: dict[str, str], inputs: dict[str, str], outputs: list[Path],
    device: str, started: float, results: dict[str, Any],
) -> Path:  # fmt: skip
    """Write the report of a stage, the last thing it does."""
    path = run.paths.report(stage)
    write_report(
        path, stage=stage, config=config_block(config, sources), inputs=inputs,
        outputs={file.name: sha256_of(file) for file in outputs}, results=plain(results), device=device,
        seconds=time.monotonic() - started,
    )  # fmt: skip
    return path


def config_block(config: ModelConfig, sources: dict[str, str]) -> dict[str, Any]:
    """The settings of a stage for its report, and where those that are no defaults came from."""
    settings = {k: v for k, v in plain(config.model_dump(mode="json")).items() if k not in _NOT_IN_REPORT}
    return {"settings": settings, "from": {k: v for k, v in sources.items() if k in settings and v != "default"}}


def site_row(site: Site, count: int) -> dict[str, Any]:
    """A site for a report."""
    return {
        "index": site.index, "name": site.name, "operation": site.operation, "kind": site.kind, "layout": site.layout,
        "channels": site.channels, "gate": site.gate, "after_addition": site.after_addition, "main_path": site.main_path,
        "count": count,
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Only what YAML and JSON know: no tuples, paths or numpy numbers."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") and not isinstance(value, str) else value
