"""How a table of the paper is made: the chain of commands behind it, as ``tables.yaml`` has them. Nothing is run here."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings.paper import ReproduceConfig
from .tables import PaperTable, content, in_paper, paper_table

FIGURE = "figure1"
EMBEDDED = "resnet18-w16"
USUAL_ALPHA = "0.2"
"""Which the paper recommends."""
PGD_GELU = "pgd-gelu"
"""The trained model in whose place ``--model`` stands."""


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


@dataclass(frozen=True)
class _Subject:
    """A calibrated run: what every command on it has in front, and at its end. ``config``: its own YAML says the budget."""

    run: Path
    calibrated: Step
    front: dict[str, Any]
    end: dict[str, Any]
    alpha: str | None = None


def plan(config: ReproduceConfig, names: Iterable[str]) -> list[Step]:
    """The commands of these tables, and of ``figure1``: each once, after those that it needs.

    Raises ConfigError for a table that is not there, or of which nothing is left to do.
    """
    planner = _Planner(config)
    for name in names:
        if name == FIGURE:
            planner.figure()
        else:
            planner.table(paper_table(name))
    return list(planner.steps.values())


class _Planner:
    def __init__(self, config: ReproduceConfig) -> None:
        self.config, self.steps = config, dict[tuple[str, ...], Step]()
        batch_size = config.batch_size or (1000 if config.device.startswith("cuda") else 250)
        self.machine: dict[str, Any] = {"device": config.device, "batch-size": batch_size}
        grids = {
            name: grid.get("quick" if config.quick else "full", grid["full"])
            for name, grid in content()["grids"].items()
        }
        self.values = {name: getattr(config, name.replace("-", "_")) or grid for name, grid in grids.items()}
        self.values |= {"attack": config.attack, "eps": config.eps}

    def table(self, table: PaperTable) -> None:
        """The commands of one table."""
        if table.models:
            runs, after = self._of_trained(table)
        elif table.by == "fraction":
            runs, after = self._of_parts(table)
        elif table.in_place_of and self.config.model is None:
            runs, after = self._of_headline(table)
        else:
            columns = table.in_place_of or ("",)
            alpha = table.column(columns[0]).cells[-1].where["alpha"] if table.in_place_of else None
            subject = self._of_model(self._run, self.config.model or EMBEDDED, alpha=alpha)
            runs, after = [_of_column(name, subject.run) for name in columns], self._measured(subject, table.steps)
        page = ["-o", f"{self.config.output}", *options({"data-note": self.config.data_note})]
        self._step("table", table.number, *runs, *page, after=after)

    def figure(self) -> None:
        """A channel before and after the operator."""
        subject = self._of_model(self._run, self.config.model or EMBEDDED)
        words = options(content()[FIGURE] | self._data() | {"device": self.config.device})
        copy_to = self.config.output / f"{FIGURE}.png"
        self._step("plot", f"{subject.run}", *words, after=[subject.calibrated], copy_to=copy_to)

    # ---- the runs of a table, as the words of ``meansparse table``, and the commands that make them

    def _of_trained(self, table: PaperTable) -> tuple[list[str], list[Step]]:
        runs, after = list[str](), list[Step]()
        for column, kind in table.models.items():
            if kind == PGD_GELU and self.config.model is not None:
                subject = self._of_model(self._run, self.config.model)
            else:
                name = f"{kind}-w{self.config.width}"
                file, trained = self._trained(kind, self.config.models_dir / name)
                subject = self._of_model(self.config.runs_dir / name, f"{file}", after=trained)
            runs.append(_of_column(column, subject.run))
            after += self._measured(subject, table.steps)
        return runs, after

    def _of_parts(self, table: PaperTable) -> tuple[list[str], list[Step]]:
        config = self.config.headline_config
        run = self._run if config is None else self.config.runs_dir / config.stem
        runs, after = list[str](), list[Step]()
        for part in [*(cell.row for cell in table.columns[0].cells), "1"]:
            place = run.with_name(f"{run.name}-part-{part}")
            more = {"fraction": part}
            if config is None:
                subject = self._of_model(place, self.config.model or EMBEDDED, more=more, alpha=USUAL_ALPHA)
            else:
                subject = self._of_config(place, config, self._data() | self.machine, more=more)
            runs.append(f"{subject.run}")
            after += self._measured(subject, table.steps)
        return runs, after

    def _of_headline(self, table: PaperTable) -> tuple[list[str], list[Step]]:
        """One job a model: the page has what was run in any of them."""
        columns = {column.config: column for column in table.columns if column.config is not None}
        known = {column.config for name in ("1", "12", "headline") for column in paper_table(name).columns}
        if unknown := set(self.config.only) - known:
            raise ConfigError(
                f"no headline model {', '.join(sorted(unknown))}",
                hint=f"--only one of: {', '.join(sorted(filter(None, known)))}",
            )
        chosen = [name for name in columns if not self.config.only or name in self.config.only]
        if not chosen:
            raise ConfigError(
                f"no model of {in_paper(table.number)} in --only {' '.join(self.config.only)}",
                hint=f"its models: {', '.join(columns)}",
            )
        after = list[Step]()
        for name in chosen:
            end = self._data(columns[name].dataset) | {"device": self.config.device}
            alpha = columns[name].cells[-1].where["alpha"]
            subject = self._of_config(self.config.runs_dir / name, Path("configs") / f"{name}.yaml", end, alpha=alpha)
            steps = [column.step for column in table.columns if column.config == name]
            after += self._measured(subject, sorted(steps))
        folders = {name: self.config.runs_dir / name for name in columns}
        return sorted(f"{f}" for name, f in folders.items() if name in chosen or (f / "calibrate.yaml").exists()), after

    # ---- a calibrated run

    @property
    def _run(self) -> Path:
        return self.config.run or self.config.runs_dir / folder_name(self.config.model or EMBEDDED)

    def _trained(self, kind: str, folder: Path) -> tuple[Path, list[Step]]:
        """The weights of a model of ``meansparse train``, and its training where they are not there."""
        file = folder / "model.safetensors"
        if file.exists():
            return file, []
        method, activation = kind.split("-")
        of_model = {"preset": self.config.preset, "dataset": "cifar10", "method": method, "activation": activation}
        words = options(
            of_model | {"width": self.config.width, "run": folder} | self._data() | {"device": self.config.device}
        )
        return file, [self._step("train", *words, *shlex.split(self.config.train_options))]

    def _of_model(
        self,
        run: Path,
        model: str,
        *,
        more: Mapping[str, Any] | None = None,
        after: Sequence[Step] = (),
        alpha: str | None = None,
    ) -> _Subject:
        end = self._data() | self.machine
        words = options({"run": run, "model": model} | dict(more or {}) | end)
        return _Subject(run, self._step("calibrate", *words, after=after), {"run": run}, end, alpha)

    def _of_config(
        self,
        run: Path,
        config: Path,
        end: dict[str, Any],
        *,
        more: Mapping[str, Any] | None = None,
        alpha: str | None = None,
    ) -> _Subject:
        front = {"config": config, "run": run}
        words = options(front | dict(more or {}) | end)
        return _Subject(run, self._step("calibrate", *words), front, end, alpha)

    def _data(self, dataset: str | None = None) -> dict[str, str]:
        """``--data-dir``; a data set of its own folder goes before the one for all."""
        sets = {column.dataset for column in paper_table("headline").columns}
        folders = dict[str | None, str]()
        for given in self.config.data_dir:
            name, equals, folder = given.partition("=")
            folders |= {name: folder} if equals and name in sets else {None: given}
        found = folders.get(dataset, folders.get(None))
        return {} if found is None else {"data-dir": found}

    # ---- commands

    def _measured(self, subject: _Subject, names: Iterable[str]) -> list[Step]:
        """The measurements and evaluations of these names on a run."""
        return [self._measure(subject, name, content()["steps"][name]) for name in names]

    def _measure(self, subject: _Subject, name: str, given: Mapping[str, Any]) -> Step:
        config = self.config
        values = self.values | {"alpha": subject.alpha}
        command, name = given.get("command", "measure"), given.get("name", name)
        own = {key: _filled(value, values) for key, value in given.items() if key not in ("command", "name")}
        if "config" in subject.front:  # which says the budget
            own = {key: value for key, value in own.items() if key not in ("norm", "eps")}
        is_attacked = own["attack"] != "none"
        images = {"n-examples": config.n_examples if is_attacked else config.n_clean}
        words = [*options(subject.front | {"name": name} | own), *options(_with(subject.end, images))]
        if is_attacked and command == "measure" and "batch-size" in subject.end:
            words += options({"block-size": subject.end["batch-size"]})
        if is_attacked:
            words += shlex.split(config.attack_options)
        if command == "evaluate":
            words += options({"fresh": config.fresh})
        return self._step(command, *words, after=[subject.calibrated])

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


def _of_column(column: str, run: Path) -> str:
    return f"{column}={run}" if column else f"{run}"


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    return values[value[1:]] if isinstance(value, str) and value.startswith("$") else value


def _with(end: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """The number of images stands behind the folder that they are in."""
    folder = {key: value for key, value in end.items() if key == "data-dir"}
    return folder | dict(images) | {key: value for key, value in end.items() if key not in folder}
