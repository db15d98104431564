"""RobustBench's tables of models; the only file that imports robustbench.

RobustBench 1.1.1 does not import as installed: it asks for ``autoattack`` while its dependency installs
``pyautoattack``, and for ``pkg_resources``, which setuptools dropped in version 81. Both are lent to it for the length
of the import.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ..errors import ConfigError
from .names import ZooEntry


@cache
def robustbench_tables() -> dict[ZooEntry, dict[str, Any]]:
    """Every model of the zoo in RobustBench's order, with its row; a few seconds the first time."""
    tables = import_robustbench().model_dicts
    return {
        ZooEntry(name, dataset.value, threat.value): row
        for dataset, threats in tables.items()
        for threat, rows in threats.items()
        for name, row in rows.items()
    }


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What other people's code prints and warns of is not our user's business."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def import_robustbench() -> ModuleType:
    """Its module of tables. Raises ConfigError where it cannot be imported."""
    lent: dict[str, Any] = {}
    try:
        if not _is_installed("autoattack"):
            lent["autoattack"] = importlib.import_module("pyautoattack")
            lent["autoattack.state"] = importlib.import_module("pyautoattack.state")
        if not _is_installed("pkg_resources"):
            lent["pkg_resources"] = SimpleNamespace(resource_filename=_resource_filename)
        sys.modules.update(lent)
        with quietly():
            return importlib.import_module("robustbench.model_zoo.models")
    except ImportError as error:
        raise ConfigError(
            f"RobustBench cannot be imported: {error}", hint="install it: python -m pip install robustbench==1.1.1"
        ) from error
    finally:
        for name in lent:  # whoever asks for the real one later must not find ours
            sys.modules.pop(name, None)


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _resource_filename(name: str, resource: str) -> str:
    """The one function RobustBench uses of pkg_resources: the path of a file that lies beside a module."""
    return str(Path(str(sys.modules[name].__file__)).parent / resource)
