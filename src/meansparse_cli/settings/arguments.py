"""What some commands take from the command line alone; none of it is a setting of a stage."""

from pathlib import Path
from typing import Annotated

from .options import ALLOW_PICKLE, THREAT, Alpha, Arguments, Fresh, StageArguments, argument, of_model, of_run, option


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
