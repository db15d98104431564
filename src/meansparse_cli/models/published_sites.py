"""Networks with published MeanSparse operators, which give way to sites for ours.

RobustBench's ``Amini2024MeanSparse_*`` architectures hold MeanSparse modules of their own making, also where there is
no activation. Each is replaced by an ``OperatorPlace``, so that the network is the base model again, under its own
tensor names.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, SiteError
from ..sites.channels import layout_of
from ..sites.find import Site, find_sites, untouched, unwrap
from ..sites.foreign import forward_failed
from .published_checkpoint import NEEDED_BUFFERS, PublishedCheckpoint, PublishedFile, bare_path


class OperatorPlace(nn.Identity):
    """Where a published operator was, which had statistics for ``channels``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels


def find_published_operators(model: nn.Module, images: Tensor) -> list[Site]:
    """The sites of published operators (or of the places they left), in call order; [] if there are none.

    ``images`` (batch, channels, height, width) are run once, to see each operator's layout.
    """
    model = unwrap(model)
    operators = _operators(model)
    if not operators:
        return []
    path_of = {module: path for path, module in operators.items()}
    seen: dict[str, list[tuple[int, ...]]] = {}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module in path_of:
            seen.setdefault(path_of[module], []).append(tuple(args[0].shape))

    try:
        with untouched(model), torch.no_grad(), nn.modules.module.register_module_forward_pre_hook(see):
            model(images)
    except Exception as error:  # the user's code may raise anything
        raise forward_failed(error, f"on images of shape {tuple(images.shape)}") from error
    return [_site(index, path, operators[path], shapes) for index, (path, shapes) in enumerate(seen.items())]


def take_out(model: nn.Module) -> nn.Module:
    """Replace every published operator by a place that does nothing; in place, and nothing where there are none."""
    for path, operator in _operators(model).items():
        if not isinstance(operator, OperatorPlace):
            model.set_submodule(path, OperatorPlace(_channels(operator)).train(operator.training))
    return model


def published_sites(
    model: nn.Module, images: Tensor, held: PublishedCheckpoint | None, files: Sequence[PublishedFile]
) -> list[Site]:
    """The sites the authors used on ``model``, a base after ``take_out``, in call order and numbered from 0.

    Where its file has operators (``held``) they are the file's; else every place of the architecture; else, for the
    models of the authors' first scheme, the activations whose path, with ``.0`` behind it, is one of a ``files`` entry.
    """
    places = find_published_operators(model, images)
    if held is None and places:
        return places
    if held is not None:
        has_all = {held.path_of(site.path) for site in places} >= set(held.statistics)
        chosen = [s for s in (places if has_all else find_sites(model, images)) if held.path_of(s.path)]
        if len(chosen) != len(held.statistics):
            missing = sorted(set(held.statistics) - {held.path_of(site.path) for site in chosen})
            raise CheckpointError(f"the network has no place for {len(missing)} operators of its file: {missing[:3]}")
    else:
        found = find_sites(model, images)
        chosen = [s for s in found if any(re.fullmatch(f.pattern, f"{bare_path(s.path)}.0") for f in files)]
    if not chosen:
        raise SiteError(
            "no published MeanSparse model has this architecture", hint="choose among its activations: --sites all"
        )
    return [replace(site, index=index) for index, site in enumerate(chosen)]


def _operators(model: nn.Module) -> dict[str, nn.Module]:
    """By path. A batch norm has running statistics as well, but no threshold."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, OperatorPlace)
        or all(isinstance(getattr(module, name, None), Tensor) for name in NEEDED_BUFFERS)
    }


def _channels(operator: Any) -> int:
    return operator.channels if isinstance(operator, OperatorPlace) else len(operator.running_mean)


def _site(index: int, path: str, operator: nn.Module, shapes: list[tuple[int, ...]]) -> Site:
    channels, shape = _channels(operator), shapes[0]
    if len(shapes) > 1:
        raise SiteError(f"{path} is called {len(shapes)} times in one forward pass", hint="expected once")
    # as the published classes have it: second axis where the size fits (NCHW), else the last (NHWC, tokens)
    axis = 1 if len(shape) != 3 and shape[1] == channels else len(shape) - 1
    if shape[axis] != channels:
        raise SiteError(f"{path} has statistics for {channels} channels, its input is {shape}")
    layout = layout_of(len(shape), axis)
    return Site(index, path, path, "module", "MeanSparse", layout, axis, channels, shape[1:], gate=False)
