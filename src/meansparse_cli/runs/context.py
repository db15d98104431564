"""One stage at work on one run: what it reads is read here, once, and what it found is written here, last."""

import logging
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils.data import Subset

from ..data.examples import Examples, stack_examples
from ..data.facts import KNOWN_DATASETS
from ..data.identity import identity
from ..data.imagenet import Preprocessing
from ..data.splits import DataSet, Split, SplitName, take_examples
from ..engine.outcomes import attacks_id
from ..errors import ArtifactError, ConfigError, DataError
from ..files import sha256_of
from ..models.names import fetch_command
from ..models.source import channels_taken, kind_of, load_model
from ..models.weights import network_id
from ..reporting.console import phase
from ..settings.shard import Shard
from ..settings.stages import AttackConfig, StageConfig
from ..settings.values import eps_for
from ..sites.rules import among_published
from .device import batch_size_on, pick_device
from .folder import check_code, locate_run, places_in
from .report import (
    STAGES,
    RunPaths,
    config_block,
    done_before,
    mend_outputs,
    own_report,
    plain,
    read_report,
    verify_outputs,
    with_options,
    write_report,
)

log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=StageConfig)


class RunContext(Generic[Config]):
    """A stage and the run it works on.

    ``run``: the run folder and its model. ``whole``: the named evaluation or measurement in it that the settings
    mean, or the run itself. ``place``: where the stage writes, that or the folder of a shard. ``inputs``: what the
    report says it was made from.
    """

    def __init__(
        self, stage: str, config: Config, sources: dict[str, str] | None = None, *, fresh: bool = False
    ) -> None:
        """Raises ArtifactError where the run is of another model, or ``--weights`` are not those that were fetched."""
        self.stage, self.config, self.sources = stage, config, sources or {}
        self.fresh, self.started = fresh, time.monotonic()
        self.inputs: dict[str, str] = {}
        self._reports: dict[Path, dict[str, Any]] = {}
        self._verified: set[str] = set()
        self.run = run = locate_run(config, self._read)
        whole, place = places_in(run.paths.folder, config)
        name, shard = None if whole == run.paths.folder else whole.name, getattr(config, "shard", None)
        self.whole = replace(run, paths=RunPaths(whole), name=name)
        self.place = replace(self.whole, paths=RunPaths(place), shard=shard)
        held = self.report("fetch")["results"]["model"]
        if held != asdict(run.source):
            name, dataset = run.source.name, run.source.dataset
            raise ArtifactError(
                f"{run.paths.folder} is a run of {held['name']} ({held['dataset']}), not of {name} ({dataset})",
                hint="choose another folder: --run DIR",
            )
        if config.weights is not None:
            self._check_weights(config.weights)

    # ---- reports

    def has(self, stage: str) -> bool:
        return self.run.paths.report(stage).exists()

    def report(self, stage: str) -> dict[str, Any]:
        """The report of ``stage``, without its chain."""
        return self._read(self.run.paths.report(stage), stage, mend=self.run.command(stage))

    def report_here(self, path: Path | None = None) -> dict[str, Any] | None:
        """``own_report`` of this very stage."""
        path = path or self.place.paths.report(self.stage)
        if path not in self._reports and (found := own_report(path, self.stage)) is not None:
            self._reports[path] = found
        return self._reports.get(path)

    def verified(self, stage: str) -> dict[str, Any]:
        """The report of ``stage`` with its whole chain checked back to fetch."""
        before: str | None = None
        for name in STAGES[: STAGES.index(stage) + 1]:
            if name not in self._verified:
                mend, report, folder = self.run.command(name), self.report(name), self.run.paths.folder
                verify_outputs(report, folder, mend=mend)
                if before is not None and not self.input(before).items() <= report["inputs"].items():
                    raise ArtifactError(
                        f"{name}.yaml was made from another {before}.yaml than the one in {folder}", hint=f"run: {mend}"
                    )
                self._verified.add(name)
            before = name
        return self.report(stage)

    def input(self, stage: str) -> dict[str, str]:
        """For ``inputs``: the report of ``stage`` by its sha256."""
        return {f"{stage}.yaml": sha256_of(self.run.paths.report(stage))}

    def settle(
        self,
        upstream: str,
        images: Split | None = None,
        attacks: Iterable[Sequence[str]] | None = None,
        **settings: Any,
    ) -> None:
        """Name the inputs: the report of ``upstream``, images, families of attacks; fill in what was left open."""
        self.inputs = self.input(upstream) | ({} if images is None else identity(images))
        if attacks is not None:
            self.inputs["attacks"] = attacks_id(tuple(chain(*attacks)))
            settings["norm"] = self.run.norm
        self.config = self.config.model_copy(update=settings)

    def done(self, *, whole: bool = False) -> Path | None:
        """The report of this stage, by all shards if ``whole``, where it was done with these settings and inputs."""
        path = (self.whole if whole else self.place).paths.report(self.stage)
        if self.fresh or (report := self.report_here(path)) is None:
            return None
        if differing := done_before(self.stage, report, self.config, self.inputs):
            log.info(differing)
        elif not mend_outputs(report, path.parent):
            log.info(f"{self.stage}: already done, nothing to do ({path}); --fresh does it again")
            return path
        return None

    def write(
        self, outputs: list[Path], results: dict[str, Any], *, device: str | None = None, path: Path | None = None
    ) -> Path:
        path = path or self.place.paths.report(self.stage)
        parts: dict[str, Any] = {
            "config": config_block(self.config.model_copy(update={"batch_size": self.batch_size}), self.sources),
            "inputs": self.inputs,
            "outputs": {file.name: sha256_of(file) for file in outputs},
            "results": plain(results),
        }
        before = self._reports.get(path)
        if before is not None and not self.fresh and parts == {key: before[key] for key in parts}:
            return path  # as it was, so that what was made from it still is
        seconds = time.monotonic() - self.started
        write_report(path, stage=self.stage, **parts, device=device or self.device, seconds=seconds)
        return path

    def _read(self, path: Path, stage: str, *, mend: str) -> dict[str, Any]:
        if path not in self._reports:
            self._reports[path] = read_report(path, stage, mend=mend)
        return self._reports[path]

    # ---- the model

    @cached_property
    def device(self) -> str:
        return pick_device(self.config.device)

    @property
    def batch_size(self) -> int:
        """Images in a forward pass, at most; the machine has no say in a statistics pass: shards meet by it."""
        given = self.config.batch_size
        return batch_size_on("cpu" if self.stage == "calibrate" else self.device) if given == "auto" else given

    @cached_property
    def weights(self) -> list[Path]:
        """The files that fetch recorded, unchanged since."""
        again = f"put it back, or fetch anew: {self._fetch_anew()}"
        files, model = self.report("fetch")["results"]["files"], kind_of(self.run.source)
        paths = [model.path_now(Path(file["path"]), file["origin"]) for file in files]
        for path, file in zip(paths, files, strict=True):
            if not path.exists():
                raise ArtifactError(f"the weights {path} are gone", hint=again)
            if sha256_of(path) != file["sha256"]:
                raise ArtifactError(f"the weights {path} changed since they were fetched", hint=again)
        return paths

    @property
    def weights_id(self) -> str | None:
        """The sha256 of the weights that fetch recorded; None for those that timm and torchvision fetch themselves."""
        return self.report("fetch")["results"]["sha256"]  # type: ignore[no-any-return]

    def base(self, rule: str = "all", *, device: str | None = None) -> nn.Module:
        """The base model; its architecture has places for the authors' operators where the site rule speaks of them."""
        check_code(self.run, self.config)
        model = load_model(
            self.run.source,
            self.weights or None,
            allow_pickle=self.config.allow_pickle,
            published_sites=among_published(rule) is not None,
            weights_key=self.report("fetch")["config"]["settings"].get("weights_key"),
        )
        if not self.weights and self.weights_id not in (None, network_id(model)):
            raise ArtifactError(
                f"{self.run.source.name} builds another network than the one that was fetched",
                hint="--weights FILE fixes its weights, or torch.manual_seed; if it was meant to change: "
                f"{self.run.command('fetch')} --fresh",
            )
        return model.to(device or self.device).eval()

    def eps_of(self, given: str | None) -> str:
        return eps_for(given, self.run.source.dataset, self.run.norm)

    def _check_weights(self, weights: Path) -> None:
        source = self.run.source
        given = [sha256_of(path) if path.is_file() else None for path in kind_of(source).paths(weights)]
        if given != [file["sha256"] for file in self.report("fetch")["results"]["files"]]:
            raise ArtifactError(
                f"--weights {weights} are not the weights that {self.run.paths.folder} is about",
                hint=f"another run for them: meansparse fetch --model {source.name} --weights {weights} --run DIR",
            )

    def _fetch_anew(self) -> str:
        """The fetch command with what its report says it was given: without its weights it would end with others."""
        given, names = self.report("fetch")["config"]["settings"], ("norm", "weights", "weights_key", "from_file")
        command = shlex.join(with_options(fetch_command(self.run.source), "fetch", given, names))
        return f"{command} {shlex.join(['--run', str(self.run.paths.folder), '--fresh'])}"

    # ---- images

    @cached_property
    def calibrated_with(self) -> dict[str, Any]:
        """The settings of calibrate, which the stages after it mean unless they say otherwise."""
        if not isinstance(self.config, AttackConfig) or not self.has("calibrate"):
            return {}
        return dict(self.report("calibrate")["config"]["settings"])

    @property
    def named_dataset(self) -> str:
        """That of the settings, or of the model: how messages and state folders call it."""
        return self.config.dataset or self.run.source.dataset

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What is done to ImageNet's pictures, as the settings name it, or calibrate's, or as the model has it."""
        named = self.config.preprocessing or self.calibrated_with.get("preprocessing")
        return kind_of(self.run.source).preprocessing(named)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of the images that the model is given; None for a data set nobody knows."""
        if (preprocessing := self.preprocessing) is not None:
            return 3, preprocessing.size, preprocessing.size
        facts = KNOWN_DATASETS.get(self.run.source.dataset)
        return facts.image_shape if facts is not None else None

    @cached_property
    def _images(self) -> DataSet:
        """That of the settings, of calibrate, or of the model, in this order."""
        before = self.calibrated_with
        dataset = self.config.dataset or before.get("dataset") or self.run.source.dataset
        data_dir = self.config.data_dir or before.get("data_dir")
        folder, order = Path(data_dir) if data_dir else None, self.config.class_order or before.get("class_order")
        return DataSet(dataset, folder, self.preprocessing, channels=self._channels, order=order or "text")

    def _channels(self) -> int | None:
        return channels_taken(self.base(device="cpu")) if (shape := self.image_shape) is None else shape[0]

    def split(self, name: SplitName) -> Split:
        return self._images.split(name)

    def take(self, name: SplitName, n: int | None, *, clamp: bool = False, shard: Shard | None = None) -> Split:
        """The first n images of a split's seeded order, or a shard of these; ``clamp``: fewer where it has less."""
        images = self.split(name)
        chosen = take_examples(images, min(n, len(images)) if clamp and n is not None else n, seed=self.config.seed)
        if not len(chosen):
            raise DataError(f"the {name} split is empty")
        if shard is None:
            return chosen
        if len(chosen) < shard.count:
            raise ConfigError(f"{len(chosen)} examples cannot be shared by {shard.count} shards")
        return Subset(chosen.dataset, [chosen.indices[i] for i in shard.positions(len(chosen))])

    def examples(self, chosen: Split) -> Examples:
        """These images, decoded, on the CPU."""
        with phase("reading", len(chosen), "images") as part:
            x, y = stack_examples(chosen, self.config.workers, part.advance, spill=self.place.paths.state / "images")
        return Examples(x, y, torch.tensor(list(chosen.indices)))
