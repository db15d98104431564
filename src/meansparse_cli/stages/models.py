"""``meansparse models``: the zoo with its published figures, as table, names or JSON."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..errors import ConfigError, ModelNotFound
from ..models.published import PublishedModel, published_date, published_models, to_json
from ..reporting.console import console, note
from ..reporting.model_tables import models_tables


def select_models(
    dataset: str | None = None, threat: str | None = None, pattern: str | None = None
) -> list[PublishedModel]:
    """The models that fit every filter; ``pattern`` is a glob (``wang2023*``) or a part of a name, in any case."""
    models = published_models()
    given = {option: value for option, value in (("dataset", dataset), ("threat", threat)) if value is not None}
    for option, value in given.items():
        known = dict.fromkeys(getattr(m, option) for m in models)
        if value.lower() not in map(str.lower, known):
            raise ConfigError(f"--{option} {value}: no model has that", hint=f"one of {', '.join(known)}")
    wanted = (pattern or "*").lower()
    wanted = wanted if any(c in wanted for c in "*?[") else f"*{wanted}*"
    found = [
        m
        for m in models
        if all(getattr(m, option).lower() == value.lower() for option, value in given.items())
        and fnmatchcase(m.name.lower(), wanted)
    ]
    if not found:
        names = {m.name.lower(): m.name for m in models}
        near = difflib.get_close_matches((pattern or "").lower(), names, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(names[name] for name in near)}? " if near else ""
        raise ModelNotFound("no model fits these filters", hint=f"{meant}every name: meansparse models")
    return found


def list_models(models: Sequence[PublishedModel], *, as_json: bool, to_terminal: bool) -> str:
    """Show the table and return what stdout gets: JSON; or the names, a line each, for a pipe or a loop to read."""
    if as_json:
        return to_json(models)
    for table in models_tables(models, width=console.width):
        console.print(table.to_rich())
    note(
        f"figures: RobustBench, {published_date()}, on the original test sets (10,000 images; ImageNet 5,000). "
        "AA: AutoAttack. ext.: an external attack, stronger than AutoAttack for that model. "
        "?: RobustBench calls its AutoAttack figure unreliable"
    )
    return "" if to_terminal else "\n".join(m.name for m in models)
