"""What some commands take from the command line alone; none of it is a setting of a stage."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from .values import Count, Names, ShardText, Width


class Arguments(BaseModel):
    """What a command takes from the command line; ``commands.yaml`` says how its help shows each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Settings(Arguments):
    """What it takes from the environment and a YAML file as well."""


class StageArguments(Arguments):
    """What every stage takes from the command line alone."""

    config: Path | None = None
    fresh: bool = False
    as_json: bool = False


class LongArguments(StageArguments):
    """What every stage that runs a model takes."""

    time_limit: float | None = None


class TrainArguments(StageArguments):
    """What training takes, whose workers share each batch."""

    jobs: Width | None = None
    devices: str | None = None


class SharedArguments(TrainArguments, LongArguments):
    """What every stage takes that several workers may share."""


class Table(Arguments):
    number: str
    runs: list[str] | None = None
    output: Path = Path("runs/tables/pages")
    data_note: str | None = None


class Reproduce(Arguments):
    """What is None is in ``paper/tables.yaml``, or is left to the commands."""

    tables: Names
    model: str | None = None
    only: Names = ()
    headline_config: Path | None = None

    data_dir: Names = ()
    data_note: str | None = None
    n_examples: Count | None = None
    n_clean: Count | None = None

    quick: bool = False
    attack: str = "apgd"
    eps: str = "8/255"
    alphas: str | None = None
    two_alphas: str | None = None
    site_alphas: str | None = None
    eps_grid: str | None = None
    attack_options: str = ""

    width: Width = 16
    preset: str = "short"
    train_options: str = ""
    models_dir: Path = Path("runs/models")

    run: Path | None = None
    runs_dir: Path = Path("runs/tables")
    output: Path = Path("runs/tables/pages")
    device: str = "auto"
    batch_size: Count | None = None
    jobs: Width = 1
    keep_going: bool = False
    fresh: bool = False
    dry_run: bool = False
    plan: bool = False


class Export(Arguments):
    run: Path
    file: Path | None = None
    format: str = "meansparse"
    card: bool = False
    hub_card: bool = False
    alpha: float | None = None
    allow_pickle: bool | None = None
    allow_code: bool | None = None


class Report(Arguments):
    run: Path
    format: str = "table"
    output: Path | None = None


class Compare(Arguments):
    runs: Names
    format: str = "table"
    output: Path | None = None


class Models(Arguments):
    dataset: str | None = None
    threat: str | None = None
    model: str | None = None
    check: bool = False
    run: Path | None = None
    shard: ShardText | None = None
    jobs: Width = 1
    fresh: bool = False
    as_json: bool = False
