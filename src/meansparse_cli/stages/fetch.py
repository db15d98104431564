"""``meansparse fetch``: weights of a model into the cache, ``fetch.yaml`` into the run folder."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data.facts import KNOWN_DATASETS
from ..errors import ArtifactError
from ..models.fetch import FetchedFile, cache_folder, fetch_weights
from ..models.source import kind_of
from ..models.weights import network_id
from ..reporting.console import live, note
from ..runs.folder import Run, check_code, folder_of, locate_run, remember_code
from ..runs.operators import count_classes
from ..runs.report import RunPaths, config_block, own_report, plain, read_report, write_report
from ..settings.stages import CalibrateConfig, FetchConfig, ModelConfig, VerifyConfig


def fetch(config: FetchConfig, sources: dict[str, str], *, fresh: bool = False) -> Path:
    """Weights of the model into the cache; ``fetch.yaml`` into the run folder."""
    started = time.monotonic()
    own_report(RunPaths(folder_of(config)).report("fetch"), "fetch")  # a damaged one is put back
    run = locate_run(config)
    check_code(run, config)
    file = run.paths.report("fetch")
    fetched = _fetch(run, config)
    sha256, about = _loaded(run, config, fetched)
    results = {
        "model": asdict(run.source),
        "sha256": sha256,
        "size": sum(file.size for file in fetched),
        "files": plain([asdict(file) for file in fetched]),
        **about,
    }
    remember_code(run)
    if file.exists() and not fresh and _is_there_already(run, results):
        note(f"fetch: {run.source.name} is already there")
        return file
    write_report(
        file, stage="fetch", config=config_block(config, sources), results=results, seconds=time.monotonic() - started
    )
    origin = ", ".join(file.origin for file in fetched)
    came = f"{results['size']:,} bytes from {origin}"
    came = came if origin else "with the weights that the factory gives it: trained ones are --weights FILE"
    note(f"fetch: {run.source.name}, {came}")
    return file


def ensure_fetched(config: CalibrateConfig | VerifyConfig, sources: dict[str, str]) -> None:
    """Calibrate, sites and verify take a model by name: it is fetched first where that was not done."""
    if config.weights is not None or not RunPaths(folder_of(config)).report("fetch").exists():
        fetch(
            FetchConfig(
                **{key: getattr(config, key) for key in ModelConfig.model_fields.keys() & config.model_fields_set}
            ),
            sources,
        )


def _fetch(run: Run, config: FetchConfig) -> Sequence[FetchedFile]:
    with live("bytes") as view:

        def on_progress(done: int, total: int | None) -> None:
            if not view.progress.tasks:
                view.begin(f"fetching {run.source.name}", total)
            view.advance(done - view.done)

        return fetch_weights(
            run.source,
            cache=cache_folder(),
            from_file=config.from_file,
            weights=config.weights,
            allow_pickle=config.allow_pickle,
            weights_key=config.weights_key,
            on_progress=on_progress,
        )


def _loaded(run: Run, config: FetchConfig, fetched: Sequence[FetchedFile]) -> tuple[str | None, dict[str, Any]]:
    """The sha256 of the weights, once the network has loaded them; and which of several sets in their file they are."""
    sha256 = fetched[0].sha256 if fetched else None
    if fetched and config.weights is None and config.weights_key is None:
        return sha256, {}
    model, files = kind_of(run.source), [file.path for file in fetched]
    network = model.load(files or None, allow_pickle=config.allow_pickle, weights_key=config.weights_key)
    facts = KNOWN_DATASETS.get(run.source.dataset)
    if model.names_code and facts is not None and run.source.dataset != "imagenet":
        count_classes(network, torch.rand((2, *facts.image_shape), generator=torch.Generator().manual_seed(0)))
    if config.weights_key is not None:
        sha256 = network_id(network)
    fitted = model.fitted
    about = {} if fitted is None or not fitted.others else {"taken": fitted.taken, "others": list(fitted.others)}
    return sha256 or network_id(network), {"weights_in_file": about} if about else {}


def _is_there_already(run: Run, results: dict[str, Any]) -> bool:
    """Was it fetched before, and the same? ArtifactError where the run is about other weights, or another model."""
    before = read_report(run.paths.report("fetch"), "fetch", mend=run.command("fetch"))["results"]
    model = kind_of(run.source)
    files = [file | {"path": str(model.path_now(Path(file["path"]), file["origin"]))} for file in before["files"]]
    if before | {"files": files} == results:
        return True
    if before["files"] and not results["files"]:
        raise ArtifactError(
            f"{run.paths.folder} is about weights from {before['files'][0]['origin']}, and none are given now",
            hint="give them again: --weights FILE; or start anew without them: --fresh",
        )
    if before["model"] != results["model"]:
        raise ArtifactError(
            f"{run.paths.folder} is a run of {before['model']['name']}, not of {run.source.name}",
            hint="choose another folder: --run DIR",
        )
    return False
