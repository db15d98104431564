"""``meansparse export``: a sparsified model as a file that others can use.

meansparse    one .safetensors: the base's weights, the operators, alpha, and how to build the network
robustbench   one .pt with the tensors of RobustBench's own ``Amini2024MeanSparse_*`` class, which loads it strictly
card          measured figures, in ``reporting/card.py``
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ArtifactError, ConfigError
from ..foreign import reading
from ..operator.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, sparsify
from ..operator.insertion import CHILD_NAME, SparsifiedModel
from ..operator.module import MeanSparse
from ..operator.shapes import HARD
from .names import ModelSource
from .published_checkpoint import published_architecture
from .source import kind_of
from .zoo import build_zoo_model

PREFIX = "base."
SCHEMA = "meansparse/model/1"
MEND = "write one that does: meansparse export RUN"


def save_exported(
    path: Path, source: ModelSource, base: nn.Module, checkpoint: Checkpoint, network: dict[str, Any]
) -> None:
    """One self-contained file, atomically. ``network``: what ``ModelKind.build`` is to be told."""
    # a copy each: tensors that share memory (tied weights) are refused by the format
    weights = {f"{PREFIX}{key}": tensor.detach().cpu().clone() for key, tensor in base.state_dict().items()}
    header = {"schema": SCHEMA, "model": asdict(source), "network": network}
    save_checkpoint(path, checkpoint, tensors=weights, header=header)


def load_exported(
    path: Path, *, alpha: float | None = None, device: str = "cpu", allow_code: bool = False
) -> SparsifiedModel:
    """The sparsified model of one exported file, in eval mode. ``alpha`` overrides the file's own.

    ``allow_code``: where the file names a ``module:factory`` as its network, import and call it. Raises ArtifactError
    for any other file, ModelNotFound where the network needs code that is not there.
    """
    checkpoint = load_checkpoint(path, mend="expected a run folder, or a file that `meansparse export RUN` wrote")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["meansparse"])
    if header.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} holds operators but no network", hint=MEND)
    with reading(ArtifactError, f"{path} does not say which network it holds", MEND):
        model = kind_of(TypeAdapter(ModelSource).validate_python(header["model"]))
        if model.names_code and not allow_code:
            raise ArtifactError(
                f"{path} names code as its network, {model.source.name}, which would be run",
                hint=f"if you trust it: load_sparsified({str(path)!r}, allow_code=True)",
            )
        network = model.build(**header["network"])
    weights = {k.removeprefix(PREFIX): v for k, v in load_file(path).items() if k.startswith(PREFIX)}
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} does not fit {model.source.name} as it is built here: {error}",
            hint="the network's code, or the version of the library that builds it, is another than at export",
        ) from error
    return sparsify(network.float().to(device).eval(), checkpoint, alpha=alpha)


def robustbench_state(source: ModelSource, model: SparsifiedModel) -> dict[str, Tensor]:
    """A sparsified model under RobustBench's names; its places without an operator are switched off (threshold 0).

    ``model`` is built on a base that has those places. Raises ConfigError where RobustBench has no such architecture,
    or no operator at one of the sites.
    """
    architecture = published_architecture(kind_of(source).entry)
    if architecture is None:
        raise ConfigError(
            f"RobustBench has no MeanSparse architecture for {source.name}",
            hint="the other format takes any model: --format meansparse",
        )
    network = build_zoo_model(architecture)
    paths = dict(network.named_modules())
    state = network.state_dict() | {k: v for k, v in model.base.state_dict().items() if f".{CHILD_NAME}." not in k}
    for site in model.sites:
        template = paths[site.path].state_dict() if site.path in paths else {}
        if "threshold" not in template:
            raise ConfigError(
                f"RobustBench's {architecture.name} has no operator at {site.name}",
                hint=f"use the authors' sites: meansparse calibrate --model {source.name} --sites published",
            )
        operator = cast(MeanSparse, model.at(site))
        if operator.shape != HARD:
            hint = "the other format takes any operator: --format meansparse"
            raise ConfigError(f"RobustBench's operator is the paper's, not of shape {operator.shape}", hint=hint)
        buffers = {name: tensor.clone() for name, tensor in template.items()}
        buffers["running_mean"] = operator.mean.to(buffers["running_mean"])
        buffers["running_var"] = operator.std.square().to(buffers["running_var"])
        buffers["threshold"].fill_(float(operator.alpha))
        buffers["flag_update_statistics"].zero_()  # it never learns again
        state |= {f"{site.path}.{name}": tensor for name, tensor in buffers.items()}
    network.load_state_dict(state, strict=True)  # RobustBench's own class has the last word
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
