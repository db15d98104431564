"""How a table of the paper is made: the commands behind it, as ``tables.yaml`` has them. Nothing is run here."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings.arguments import Reproduce
from .tables import PaperTable, content, in_paper, paper_table

FIGURE = "figure1"
EMBEDDED = "resnet18-w16"
PGD_GELU = "pgd-gelu"
"""The trained model in whose place ``--model`` stands."""
USUAL_ALPHA = "0.2"
"""Which the paper recommends."""


@dataclass(frozen=True)
class Step:
    """A command of ``meansparse``, which comes after others. ``copy_to``: for the file whose path it prints."""

    words: tuple[str, ...]
    after: tuple["Step", ...] = ()
    copy_to: Path | None = None

    @property
    def line(self) -> str:
        typed = shlex.join(["meansparse", *self.words])
        if self.copy_to is None:
            return typed
        folder, file = shlex.quote(f"{self.copy_to.parent}"), shlex.quote(f"{self.copy_to}")
        return f'mkdir -p {folder} && cp "$({typed})" {file}'


def plan(config: Reproduce) -> list[Step]:
    """The commands of these tables, and of ``figure1``: each once, after those that it needs.

    Raises ConfigError for a table that is not there, or of which nothing is left to do.
    """
    planner = _Planner(config)
    for name in config.tables:
        if name == FIGURE:
            planner.figure()
        else:
            planner.table(paper_table(name))
    return list(planner.steps.values())


@dataclass(frozen=True)
class _Run:
    """A run folder of one model, and what is done on it for which column of a table.

    ``source``: the options of ``calibrate`` alone, but for a configuration, which says the budget as well; ``end``:
    those that every command on it has. ``alpha``: where a step leaves that open.
    """

    folder: Path
    source: dict[str, Any]
    end: dict[str, Any]
    steps: Sequence[str] = ()
    column: str = ""
    alpha: str | None = None
    after: tuple[Step, ...] = ()


class _Planner:
    def __init__(self, config: Reproduce) -> None:
        self.config, self.steps = config, dict[tuple[str, ...], Step]()
        model = config.model or EMBEDDED
        self.device = {"device": config.device}
        batch_size = config.batch_size or (1000 if config.device.startswith("cuda") else 250)
        folder, end = config.run or config.runs_dir / folder_name(model), self._data() | self.device
        self.own = _Run(folder, {"model": model}, end | {"batch-size": batch_size})
        self.values: dict[str, Any] = {"attack": config.attack, "eps": config.eps}
        for name, grid in content()["grids"].items():
            usual = grid.get("quick" if config.quick else "full", grid["full"])
            self.values[name] = getattr(config, name.replace("-", "_")) or usual

    def table(self, table: PaperTable) -> None:
        named, after = list[str](), list[Step]()
        for run in self._runs(table):
            calibrated = self._calibrated(run)
            after += [self._measured(run, calibrated, name) for name in run.steps]
            named.append(f"{run.column}={run.folder}" if run.column else f"{run.folder}")
        if any(column.config for column in table.columns) and self.config.model is None:
            # with one job a model, the page has what was run in any of them
            folders = [self.config.runs_dir / f"{column.config}" for column in table.columns]
            named = sorted({*named, *(f"{folder}" for folder in folders if (folder / "calibrate.yaml").exists())})
        page = ["-o", f"{self.config.output}", *options({"data-note": self.config.data_note})]
        self._step("table", table.number, *named, *page, after=after)

    def figure(self) -> None:
        words = options(content()[FIGURE] | self._data() | self.device)
        copy_to = self.config.output / f"{FIGURE}.png"
        self._step("plot", f"{self.own.folder}", *words, after=[self._calibrated(self.own)], copy_to=copy_to)

    def _runs(self, table: PaperTable) -> Iterator[_Run]:
        own = replace(self.own, steps=table.steps)
        if table.models:
            yield from (self._trained(own, column, kind) for column, kind in table.models.items())
        elif table.by == "fraction":
            yield from self._parts(table, own)
        elif not table.in_place_of:
            yield own
        elif self.config.model is None:
            yield from self._headline(table)
        else:
            for name in table.in_place_of:
                yield replace(own, column=name, alpha=table.column(name).cells[-1].where["alpha"])

    def _trained(self, own: _Run, column: str, kind: str) -> _Run:
        config, name = self.config, f"{kind}-w{self.config.width}"
        file, (method, activation) = config.models_dir / name / "model.safetensors", kind.split("-")
        if kind == PGD_GELU and config.model is not None:
            return replace(own, column=column)
        run = replace(own, folder=config.runs_dir / name, source={"model": file}, column=column)
        if file.exists():
            return run
        network = {"method": method, "activation": activation, "width": config.width, "run": file.parent}
        words = options({"preset": config.preset, "dataset": "cifar10"} | network | self._data() | self.device)
        return replace(run, after=(self._step("train", *words, *shlex.split(config.train_options)),))

    def _parts(self, table: PaperTable, own: _Run) -> Iterator[_Run]:
        """A run of each share of the calibration images, and of all of them."""
        own, config = replace(own, alpha=USUAL_ALPHA), self.config.headline_config
        if config is not None:
            own = replace(own, folder=self.config.runs_dir / config.stem, source={"config": config}, alpha=None)
        for part in [*(cell.row for cell in table.columns[0].cells), "1"]:
            folder = own.folder.with_name(f"{own.folder.name}-part-{part}")
            yield replace(own, folder=folder, source=own.source | {"fraction": part})

    def _headline(self, table: PaperTable) -> Iterator[_Run]:
        """A run of each model of the zoo, or of those of them that ``--only`` names."""
        known = [column.config for column in paper_table("headline").columns if column.config]
        columns = {column.config: column for column in table.columns if column.config}
        only = self.config.only or known
        if not set(only) <= set(known):
            raise ConfigError(
                f"not among the headline models: {', '.join(only)}", hint=f"--only of: {', '.join(known)}"
            )
        if not set(only) & set(columns):
            said = f"no model of {in_paper(table.number)} in --only {' '.join(only)}"
            raise ConfigError(said, hint=f"its models: {', '.join(columns)}")
        for name, column in columns.items():
            if name in only:
                steps = [other.step for other in table.columns if other.config == name]
                end, source = self._data(column.dataset) | self.device, {"config": Path("configs") / f"{name}.yaml"}
                alpha = column.cells[-1].where["alpha"]
                yield _Run(self.config.runs_dir / name, source, end, steps, alpha=alpha)

    def _calibrated(self, run: _Run) -> Step:
        return self._step("calibrate", *options({"run": run.folder} | run.source | run.end), after=run.after)

    def _measured(self, run: _Run, calibrated: Step, name: str) -> Step:
        given = {"name": name} | content()["steps"][name]
        command, values = given.pop("command", "measure"), self.values | {"alpha": run.alpha}
        front = {"run": run.folder} | {key: value for key, value in run.source.items() if key == "config"}
        left_out = ("norm", "eps") if "config" in front else ()
        own = {key: _filled(value, values) for key, value in given.items() if key not in left_out}
        data = {key: value for key, value in run.end.items() if key == "data-dir"}
        is_attacked = own["attack"] != "none"
        n_examples = self.config.n_examples if is_attacked else self.config.n_clean
        words = options(front | own | data | {"n-examples": n_examples} | run.end)
        if is_attacked:
            if command == "measure" and "batch-size" in run.end:
                words += options({"block-size": run.end["batch-size"]})
            words += shlex.split(self.config.attack_options)
        words += options({"fresh": self.config.fresh}) if command == "evaluate" else []
        return self._step(command, *words, after=[calibrated])

    def _data(self, dataset: str | None = None) -> dict[str, Any]:
        """``--data-dir``: the folder of the data set, else the one for all."""
        folders = dict[str | None, str]()
        for given in self.config.data_dir:
            name, equals, folder = given.partition("=")
            is_of_one = equals and name in {column.dataset for column in paper_table("headline").columns}
            folders |= {name: folder} if is_of_one else {None: given}
        found = folders.get(dataset, folders.get(None))
        return {} if found is None else {"data-dir": found}

    def _step(self, *words: str, after: Sequence[Step] = (), copy_to: Path | None = None) -> Step:
        return self.steps.setdefault(words, Step(words, tuple(after), copy_to))


def options(values: Mapping[str, Any]) -> list[str]:
    """The words of some options; a list is repeated, True is a switch, None and False are left out.

    >>> options({"alpha": 0.2, "attack": ["apgd", "bpda"], "individual": True, "data-note": None})
    ['--alpha', '0.2', '--attack', 'apgd', '--attack', 'bpda', '--individual']
    """
    words = []
    for key, value in values.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each is not False:
                words += [f"--{key}"] if each is True else [f"--{key}", f"{each}"]
    return words


def folder_name(model: str) -> str:
    """What the run of a model is called; a file of ``meansparse train`` has the name of its folder.

    >>> folder_name("runs/models/pgd-gelu-w64/model.safetensors"), folder_name("timm:resnet50")
    ('pgd-gelu-w64', 'timm_resnet50')
    """
    path = Path(model)
    name = path.parent.name if path.name == "model.safetensors" and path.parent.name else path.name
    return name.removesuffix(".safetensors").replace(":", "_")


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_filled(each, values) for each in value]
    return values[value[1:]] if isinstance(value, str) and value.startswith("$") else value
