"""How an option is declared: once, as a field with help, default and panel; and the options that commands share."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticUndefined

from .values import EpsText


class Arguments(BaseModel):
    """What a command takes from the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Settings(Arguments):
    """What it takes from the environment and a YAML file as well."""


def option(
    help: str,
    default: Any = PydanticUndefined,
    *,
    panel: str | None = None,
    spelled: tuple[str, ...] = (),
    metavar: str | None = None,
    unset: str | None = None,
    has_no: bool | None = None,
    is_argument: bool = False,
    **limits: Any,
) -> Any:
    """A field that is an option, spelled like the field, and how the help shows it.

    ``unset`` stands for a default of None. A switch has a ``--no-`` form unless it is off by default;
    ``has_no`` says otherwise. ``limits`` are pydantic's: ``ge=1``, ``gt=0``.
    """
    shown: Any = {"panel": panel, "spelled": list(spelled), "metavar": metavar, "unset": unset, "has_no": has_no}
    return Field(default, description=help, json_schema_extra=shown | {"is_argument": is_argument}, **limits)


argument = partial(option, is_argument=True)
of_model = partial(option, panel="Model")
of_data = partial(option, panel="Data")
of_attack = partial(option, panel="Attack")
of_training = partial(option, panel="Training")
of_run = partial(option, panel="Run")

DATASET = of_data(
    "digits, cifar10, cifar100, imagenet, or the path of an image folder, a zip of one, or an .npz.",
    unset="the model's own",
)
THREAT = of_model("Linf, L2 or corruptions: which zoo entry.")
ALLOW_PICKLE = of_model("Load weights that run Python code. Trusted files only.", has_no=False)
DataDir = Annotated[
    Path | None, of_data("Folder that holds the data set; the one that MEANSPARSE_DATA names by default.")
]
NExamples = Annotated[int | None, of_data("How many examples of the split to use.", unset="all", ge=1)]
Workers = Annotated[int, of_data("Processes that decode images.", ge=0)]

Alpha = Annotated[float | None, of_attack("This alpha, not the chosen one.")]
Eps = Annotated[EpsText | None, of_attack("Budget in [0, 1] pixel units: 8/255 or 0.03.", unset="the data set's own")]

Device = Annotated[str, of_run("auto, cpu, cuda:0, ...")]
Seed = Annotated[int, of_run("Seed of example order and attacks.")]
Fresh = Annotated[bool, of_run("Do it again even if it was done, from nothing.")]


class StageArguments(Arguments):
    """What every stage takes from the command line alone."""

    config: Path | None = of_run("YAML with any of these options; flags win.", None)
    fresh: Fresh = False
    as_json: bool = of_run("The report as JSON on stdout, not its path.", False, spelled=("--json",))
