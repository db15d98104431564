"""The user's own network: ``module:attribute`` or ``file.py:attribute``, looked for in the current directory too."""

import contextlib
import difflib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..errors import ModelNotFound
from .classifier import as_classifier
from .kind import ModelKind
from .names import WeightFile


class FactoryModel(ModelKind):
    """A network that code of the user's builds, with whatever weights it gives it."""

    kind = "factory"
    names = ".*:.*"
    names_code = True

    def weights(self) -> tuple[WeightFile, ...]:
        return ()

    def build(self, *, published_sites: bool = False, settings: dict[str, Any] | None = None) -> nn.Module:
        """Weights drawn at random are the same in each stage: PyTorch's generator is seeded meanwhile."""
        name = self.source.name
        with _among_theirs(name), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            factory = import_named(name)
            try:
                model = factory if isinstance(factory, nn.Module) else factory()
            except (Exception, SystemExit) as error:  # the user's code may raise anything
                raise ModelNotFound(
                    f"{name}() failed: {type(error).__name__}: {error}", hint="it is called without arguments"
                ) from error
        if not isinstance(model, nn.Module):
            gave = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            raise ModelNotFound(f"{name}() gave {gave}, expected a torch.nn.Module", hint="return the network itself")
        return as_classifier(model, name)


def import_named(name: str) -> Any:
    """What ``module:attribute`` or ``file.py:attribute`` is. Raises ModelNotFound; importing is running code."""
    module_name, _, attribute = name.rpartition(":")
    with _among_theirs(name):
        module = _import_module(module_name)
    if hasattr(module, attribute):
        return getattr(module, attribute)
    public = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
    close = difflib.get_close_matches(attribute, public, n=5, cutoff=0)
    hint = f"it has {', '.join(close) or 'nothing that can be called'}"
    raise ModelNotFound(f"{module_name} has no {attribute!r}", hint=hint)


def code_of(name: str) -> str | None:
    """``module:factory`` with the place of its code on this machine; None where there is none. Imports nothing."""
    module_name, _, attribute = name.rpartition(":")
    if module_name.endswith(".py"):
        file = Path(module_name).resolve()
        return f"{file}:{attribute}" if file.is_file() else None
    with _among_theirs(name):
        # the package at the top alone: to look for what is inside of it would import it
        spec = importlib.machinery.PathFinder.find_spec(module_name.partition(".")[0])
    places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return f"{Path(places[0]).resolve()} {module_name}:{attribute}" if places and places[0] else None


def _import_module(name: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(f"_factory_{Path(name).stem}", name)
        assert spec is not None and spec.loader is not None  # always, for a name that ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses and pickle look for it
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        is_absent = isinstance(error, FileNotFoundError) or getattr(error, "name", None) == name
        reason = "no such module" if is_absent else f"importing it failed: {type(error).__name__}: {error}"
        raise ModelNotFound(
            f"{name}: {reason}", hint=f"--model module:factory looks in {Path.cwd()} and among the installed packages"
        ) from error


@contextlib.contextmanager
def _among_theirs(name: str) -> Iterator[None]:
    """Modules are found in the current directory, and beside a ``file.py``, before what is installed.

    What code prints meanwhile goes to people: stdout is for the path of the report.
    """
    importlib.invalidate_caches()  # the file may be younger than the directory's listing
    module_name = name.rpartition(":")[0]
    beside = [str(Path(module_name).resolve().parent)] if module_name.endswith(".py") else []
    places = [str(Path.cwd()), *beside, *sys.path]
    with mock.patch.object(sys, "path", places), contextlib.redirect_stdout(sys.stderr):
        yield
