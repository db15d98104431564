"""What some commands take from the command line alone; none of it is a setting of a stage."""

from pathlib import Path
from typing import Annotated

from .options import (
    ALLOW_PICKLE,
    THREAT,
    Alpha,
    Arguments,
    Device,
    Fresh,
    StageArguments,
    argument,
    of_attack,
    of_data,
    of_model,
    of_run,
    of_training,
    option,
)
from .values import Names


class Sites(StageArguments):
    as_json: bool = of_run("The sites as JSON on stdout, not a table on stderr.", False, spelled=("--json",))


class Verify(StageArguments):
    file: Path = argument("Adversarial images: .safetensors, .pt, .npz or .npy.")


class Table(Arguments):
    number: str = argument(
        "1 to 12, headline or subset; summary: what became of the paper's claims, from the tables that lie in the "
        "folder."
    )
    runs: list[str] | None = argument(
        "Run folders with finished evaluations or measurements; COLUMN=RUN where a run does not tell its column.",
        None,
        metavar="[RUN]...",
    )
    output: Path = option("Folder for tableN.md and tableN.yaml.", Path("docs/tables"), spelled=("--output", "-o"))
    data_note: str | None = option("What the page says of the data, such as: CIFAR-10, JPEG copies.", None)


class Reproduce(Arguments):
    """What is None is in ``paper/tables.yaml``, or is left to the commands."""

    tables: Names = argument("1 to 12, headline, subset or figure1.", metavar="TABLE...")
    model: str | None = of_model("This model, in the place of the paper's: resnet18-w16, or the zoo's.", None)
    only: Names = of_model("Of the headline models the one of configs/NAME.yaml alone, may be repeated.", ())
    headline_config: Path | None = of_model("Of the subset table: the YAML of a headline model, not --model.", None)

    data_dir: Names = of_data("Folder of the data; DATASET=DIR for one data set, may be repeated.", ())
    data_note: str | None = of_data("What the pages say of the data.", None)
    n_examples: int | None = of_data("Images to attack; all of them by default.", None, ge=1)
    n_clean: int | None = of_data("Images for clean accuracy; all of them by default.", None, ge=1)

    quick: bool = of_attack("Only the alphas and eps that the paper's claims need.", False)
    attack: str = of_attack("Where the paper has APGD: apgd, or apgd-ce alone.", "apgd")
    eps: str = of_attack("Linf budget of the ablations.", "8/255")
    alphas: str | None = of_attack("Of the tables by alpha.", None)
    two_alphas: str | None = of_attack("Of the tables by eps.", None)
    site_alphas: str | None = of_attack("Of the table by site.", None)
    eps_grid: str | None = of_attack("Of the tables by eps.", None)
    attack_options: str = of_attack("More options of every attack, as one text.", "")

    width: int = of_training("Of the networks that are trained.", 16, ge=1)
    preset: str = of_training("Of their training: paper or short.", "short")
    train_options: str = of_training("More options of train, as one text.", "")
    models_dir: Path = of_training("Where they lie, or are trained into.", Path("runs/models"))

    run: Path | None = of_run("Run folder of the model; one in --runs-dir by default.", None)
    runs_dir: Path = of_run("Folder for the runs.", Path("runs/tables"))
    output: Path = of_run("Folder for the pages.", Path("docs/tables"), spelled=("--output", "-o"))
    device: Device = "auto"
    batch_size: int | None = of_run("Images a forward pass; 250, or 1000 on a GPU that --device names.", None, ge=1)
    jobs: int = of_run("Commands side by side.", 1, ge=1)
    keep_going: bool = of_run("A command that fails does not stop those that do without it.", False)
    fresh: bool = of_run("Begin evaluations anew.", False)
    dry_run: bool = of_run("Print the commands, run none.", False)


class Export(Arguments):
    run: Path = argument("Run folder.")
    file: Path | None = argument("File to write; one in the run folder by default.", None)
    format: str = option(
        "meansparse: one self-contained .safetensors; robustbench: a .pt for RobustBench's own class.", "meansparse"
    )
    card: bool = option("A leaderboard card, as JSON, of what evaluate measured.", False)
    alpha: Alpha = None
    allow_pickle: Annotated[bool | None, ALLOW_PICKLE] = None


class Report(Arguments):
    run: Path = argument("Run folder; or an evaluation, a measurement or a shard in it.")
    format: str = option("table, markdown, json or html (one page, everything inside).", "table")
    output: Path | None = option("File to write, instead of stdout.", None, spelled=("--output", "-o"))


class Models(Arguments):
    dataset: str | None = of_model("digits, cifar10, cifar100 or imagenet.", None)
    threat: Annotated[str | None, THREAT] = None
    model: str | None = of_model("Part of a name, or a glob: [b]wang2023*[/b].", None, metavar="PATTERN")
    check: bool = option("Build each and prove that MeanSparse works on it; exit code 1 if not.", False)
    run: Path | None = of_run("Folder of the check's report; runs/zoo-check by default.", None)
    jobs: int = of_run("Models checked at a time, each in a process of its own.", 1, ge=1)
    fresh: Fresh = False
    as_json: bool = of_run("JSON on stdout.", False, spelled=("--json",))
