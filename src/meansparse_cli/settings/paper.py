"""The settings of ``meansparse reproduce``, which makes tables of the paper from nothing."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from .config import Names


def _option(help: str, panel: str, *, unset: str | None = None, **limits: Any) -> Any:
    shown: Any = {"panel": panel, "metavar": None, "unset": unset, "has_no": None}
    return Field(description=help, json_schema_extra=shown, **limits)


_MODEL, _DATA, _ATTACK, _TRAINING, _RUN = "Model", "Data", "Attack", "Training", "Run"


class ReproduceConfig(BaseModel):
    """``meansparse reproduce``. What is None is in ``paper/tables.yaml``, or is left to the commands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[
        str | None, _option("This model, in the place of the paper's.", _MODEL, unset="resnet18-w16, or the zoo's")
    ] = None
    only: Annotated[
        Names, _option("Of the headline models the one of configs/NAME.yaml alone, may be repeated.", _MODEL)
    ] = ()
    headline_config: Annotated[
        Path | None, _option("Of the subset table: a headline model's YAML, in the place of --model.", _MODEL)
    ] = None

    data_dir: Annotated[
        Names, _option("Folder of the data; DATASET=DIR for one data set, may be repeated.", _DATA)
    ] = ()
    data_note: Annotated[str | None, _option("What the pages say of the data.", _DATA)] = None
    n_examples: Annotated[int | None, _option("Images to attack.", _DATA, unset="all", ge=1)] = None
    n_clean: Annotated[int | None, _option("Images for clean accuracy.", _DATA, unset="all", ge=1)] = None

    quick: Annotated[bool, _option("Only the alphas and eps that the paper's claims need.", _ATTACK)] = False
    attack: Annotated[str, _option("Where the paper has APGD: apgd, or apgd-ce alone.", _ATTACK)] = "apgd"
    eps: Annotated[str, _option("Linf budget of the ablations.", _ATTACK)] = "8/255"
    alphas: Annotated[str | None, _option("Of the tables by alpha.", _ATTACK)] = None
    two_alphas: Annotated[str | None, _option("Of the tables by eps.", _ATTACK)] = None
    site_alphas: Annotated[str | None, _option("Of the table by site.", _ATTACK)] = None
    eps_grid: Annotated[str | None, _option("Of the tables by eps.", _ATTACK)] = None
    attack_options: Annotated[str, _option("More options of every attack, as one text.", _ATTACK)] = ""

    width: Annotated[int, _option("Of the networks that are trained.", _TRAINING, ge=1)] = 16
    preset: Annotated[str, _option("Of their training: paper or short.", _TRAINING)] = "short"
    train_options: Annotated[str, _option("More options of train, as one text.", _TRAINING)] = ""
    models_dir: Annotated[Path, _option("Where they lie, or are trained into.", _TRAINING)] = Path("runs/models")

    run: Annotated[Path | None, _option("Run folder of the model; one in --runs-dir by default.", _RUN)] = None
    runs_dir: Annotated[Path, _option("Folder for the runs.", _RUN)] = Path("runs/tables")
    output: Annotated[Path, _option("Folder for the pages.", _RUN)] = Path("docs/tables")
    device: Annotated[str, _option("auto, cpu, cuda:0, ...", _RUN)] = "auto"
    batch_size: Annotated[
        int | None, _option("Images a forward pass.", _RUN, unset="250; 1000 on a GPU that --device names", ge=1)
    ] = None
    jobs: Annotated[int, _option("Commands side by side.", _RUN, ge=1)] = 1
    keep_going: Annotated[bool, _option("A command that fails does not stop those that do without it.", _RUN)] = False
    fresh: Annotated[bool, _option("Begin evaluations anew.", _RUN)] = False
    dry_run: Annotated[bool, _option("Print the commands, run none.", _RUN)] = False
