"""How a table of the paper is made: the commands behind it, as ``tables.yaml`` has them. Nothing is run here."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    after: tuple[Step, ...] = ()
    copy_to: Path | None = None

    @property
    def line(self) -> str:
        """As it is typed in a shell."""
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
    """A calibrated run folder, and what is done on it for which column of a table.

    ``front`` and ``end``: the options that every command on it has. ``alpha``: where a step leaves that open.
    """

    folder: Path
    calibrated: Step
    front: dict[str, Any]
    end: dict[str, Any]
    steps: Sequence[str]
    column: str
    alpha: str | None


class _Planner:
    def __init__(self, config: Reproduce) -> None:
        self.config, self.steps = config, dict[tuple[str, ...], Step]()
        self.model = config.model or EMBEDDED
        self.folder = config.run or config.runs_dir / folder_name(self.model)
        self.device = {"device": config.device}
        self.batch_size = {"batch-size": config.batch_size or (1000 if config.device.startswith("cuda") else 250)}
        self.values: dict[str, Any] = {"attack": config.attack, "eps": config.eps}
        for name, grid in content()["grids"].items():
            usual = grid.get("quick" if config.quick else "full", grid["full"])
            self.values[name] = getattr(config, name.replace("-", "_")) or usual

    def table(self, table: PaperTable) -> None:
        """The commands of one table."""
        named, after = list[str](), list[Step]()
        for run in self._runs(table):
            after += [self._measured(run, name) for name in run.steps]
            named.append(f"{run.column}={run.folder}" if run.column else f"{run.folder}")
        if any(column.config for column in table.columns) and self.config.model is None:
            named = sorted({*named, *self._earlier(table)})
        page = ["-o", f"{self.config.output}", *options({"data-note": self.config.data_note})]
        self._step("table", table.number, *named, *page, after=after)

    def figure(self) -> None:
        """A channel before and after the operator."""
        run = self._run(self.folder, {"model": self.model})
        words = options(content()[FIGURE] | self._data() | self.device)
        copy_to = self.config.output / f"{FIGURE}.png"
        self._step("plot", f"{run.folder}", *words, after=[run.calibrated], copy_to=copy_to)

    def _runs(self, table: PaperTable) -> Iterator[_Run]:
        if table.models:
            return self._trained(table)
        if table.by == "fraction":
            return self._parts(table)
        if table.in_place_of and self.config.model is None:
            return self._headline(table)
        columns: list[tuple[str, str | None]] = [("", None)]
        if table.in_place_of:
            columns = [(name, table.column(name).cells[-1].where["alpha"]) for name in table.in_place_of]
        source = {"model": self.model}
        return (self._run(self.folder, source, table.steps, column=name, alpha=alpha) for name, alpha in columns)

    def _trained(self, table: PaperTable) -> Iterator[_Run]:
        """A run of each model of ``meansparse train``, which is trained where it is not there."""
        for column, kind in table.models.items():
            name = f"{kind}-w{self.config.width}"
            file, after = self.config.models_dir / name / "model.safetensors", list[Step]()
            if kind == PGD_GELU and self.config.model is not None:
                yield self._run(self.folder, {"model": self.model}, table.steps, column=column)
                continue
            if not file.exists():
                method, activation = kind.split("-")
                network = {"method": method, "activation": activation, "width": self.config.width, "run": file.parent}
                words = options(
                    {"preset": self.config.preset, "dataset": "cifar10"} | network | self._data() | self.device
                )
                after = [self._step("train", *words, *shlex.split(self.config.train_options))]
            yield self._run(self.config.runs_dir / name, {"model": file}, table.steps, column=column, after=after)

    def _parts(self, table: PaperTable) -> Iterator[_Run]:
        """A run of each share of the calibration images, and of all of them."""
        config = self.config.headline_config
        folder = self.folder if config is None else self.config.runs_dir / config.stem
        source, alpha = ({"model": self.model}, USUAL_ALPHA) if config is None else ({"config": config}, None)
        for part in [*(cell.row for cell in table.columns[0].cells), "1"]:
            place = folder.with_name(f"{folder.name}-part-{part}")
            yield self._run(place, source | {"fraction": part}, table.steps, alpha=alpha)

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
                end = self._data(column.dataset) | self.device
                source = {"config": Path("configs") / f"{name}.yaml"}
                alpha = column.cells[-1].where["alpha"]
                yield self._run(self.config.runs_dir / name, source, steps, alpha=alpha, end=end)

    def _earlier(self, table: PaperTable) -> Iterator[str]:
        """The runs of its models that are there: with one job a model, the page has what was run in any of them."""
        for column in table.columns:
            folder = self.config.runs_dir / f"{column.config}"
            if (folder / "calibrate.yaml").exists():
                yield f"{folder}"

    def _run(
        self,
        folder: Path,
        source: dict[str, Any],
        steps: Sequence[str] = (),
        *,
        column: str = "",
        alpha: str | None = None,
        after: Sequence[Step] = (),
        end: dict[str, Any] | None = None,
    ) -> _Run:
        """``source``: the options of ``calibrate`` alone, but for a configuration, which says the budget as well."""
        end = self._data() | self.device | self.batch_size if end is None else end
        calibrated = self._step("calibrate", *options({"run": folder} | source | end), after=after)
        front = {"run": folder} | {key: value for key, value in source.items() if key == "config"}
        return _Run(folder, calibrated, front, end, steps, column, alpha)

    def _measured(self, run: _Run, name: str) -> Step:
        """A measurement or an evaluation of ``tables.yaml`` on a run."""
        given = {"name": name} | content()["steps"][name]
        command, values = given.pop("command", "measure"), self.values | {"alpha": run.alpha}
        left_out = ("norm", "eps") if "config" in run.front else ()
        own = {key: _filled(value, values) for key, value in given.items() if key not in left_out}
        data = {key: value for key, value in run.end.items() if key == "data-dir"}
        if own["attack"] == "none":
            words = options(run.front | own | data | {"n-examples": self.config.n_clean} | run.end)
        else:
            words = options(run.front | own | data | {"n-examples": self.config.n_examples} | run.end)
            if command == "measure" and "batch-size" in run.end:
                words += options({"block-size": run.end["batch-size"]})
            words += shlex.split(self.config.attack_options)
        words += options({"fresh": self.config.fresh}) if command == "evaluate" else []
        return self._step(command, *words, after=[run.calibrated])

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
    return values[value[1:]] if isinstance(value, str) and value.startswith("$") else value
