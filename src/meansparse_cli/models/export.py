"""``meansparse export``: a sparsified model as a file that others can use.

meansparse    one .safetensors: the base's weights, the operators, alpha, and how to build the network. Read back in one
              line, ``load_sparsified("model.safetensors")``; no run folder, no cache, no pickle
robustbench   one .pt with the tensors of RobustBench's own ``Amini2024MeanSparse_*`` class, which loads it strictly
card          a JSON with the fields of RobustBench's ``model_info``; what was not measured is null or empty
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ArtifactError, ConfigError
from ..files import save_torch, write_bytes
from ..operator.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, sparsify

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..operator.sparsify import SparsifiedModel
    from .source import ModelSource

PREFIX = "base."
PAPER = "https://arxiv.org/abs/2406.05927"


def save_exported(
    path: Path, source: ModelSource, base: nn.Module, checkpoint: Checkpoint, network: dict[str, Any]
) -> None:
    """One self-contained file, atomically. ``network``: what ``models.build_network`` needs beside the source."""
    # a copy each: tensors that share memory (tied weights) are refused by the format
    weights = {f"{PREFIX}{key}": tensor.detach().cpu().clone() for key, tensor in base.state_dict().items()}
    header = {"schema": "meansparse/model/1", "model": asdict(source), "network": network}
    save_checkpoint(path, checkpoint, tensors=weights, header=header)


def load_exported(
    path: Path, *, alpha: float | None = None, device: str = "cpu", allow_code: bool = False
) -> SparsifiedModel:
    """The sparsified model of one exported file, in eval mode. ``alpha`` overrides the file's own.

    ``allow_code``: where the file names a ``module:factory`` as its network, import and call it. Raises ArtifactError for
    any other file, ModelNotFound where the network needs code that is not there.
    """
    from safetensors.torch import load_file

    from .source import ModelSource, build_network

    checkpoint = load_checkpoint(path, mend="expected a run folder, or a file that `meansparse export RUN` wrote")
    header = _header(path)
    if header.get("schema") != "meansparse/model/1":
        raise ArtifactError(f"{path} holds operators but no network", hint="write one that does: meansparse export RUN")
    if header["model"]["kind"] == "factory" and not allow_code:
        raise ArtifactError(
            f"{path} names code as its network, {header['model']['name']}, which would be run",
            hint=f"if you trust it: load_sparsified({str(path)!r}, allow_code=True)",
        )
    network = build_network(ModelSource(**header["model"]), **header["network"])
    weights = {k.removeprefix(PREFIX): v for k, v in load_file(path).items() if k.startswith(PREFIX)}
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} does not fit {header['model']['name']} as it is built here: {error}",
            hint="the network's code, or the version of the library that builds it, is another than at export",
        ) from error
    return sparsify(network.float().to(device).eval(), checkpoint, alpha=alpha)


def save_robustbench(path: Path, source: ModelSource, model: SparsifiedModel) -> None:
    """The state dict of RobustBench's own architecture with our operators in it, atomically."""
    save_torch(path, robustbench_state(source, model))


def robustbench_state(source: ModelSource, model: SparsifiedModel) -> dict[str, Tensor]:
    """A sparsified model under RobustBench's names; its places without an operator are switched off (threshold 0).

    ``model`` is built on a base that has those places. Raises ConfigError where RobustBench has no such architecture, or
    no operator at one of the sites.
    """
    from ..operator.sparsify import CHILD_NAME, MeanSparse
    from . import zoo
    from .published_checkpoint import operator_buffers, published_architecture

    architecture = published_architecture(source.entry) if source.kind == "zoo" else None
    if architecture is None:
        raise ConfigError(
            f"RobustBench has no MeanSparse architecture for {source.name}",
            hint="the other format takes any model: --format meansparse",
        )
    network = zoo.build_zoo_model(architecture)
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
        buffers = operator_buffers(template, operator.mean, operator.std, float(operator.alpha))
        state |= {f"{site.path}.{name}": tensor for name, tensor in buffers.items()}
    network.load_state_dict(state, strict=True)  # RobustBench's own class has the last word
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def model_card(
    source: ModelSource, norm: str, checkpoint: Checkpoint, evaluation: dict[str, Any] | None
) -> dict[str, Any]:
    """The fields of a ``model_info`` JSON, in its order, for one sparsified model; percentages as text, as there.

    ``evaluation`` is an ``evaluate.yaml`` or None. ``clean_acc``, ``autoattack_acc``, ``reported`` and ``external`` (the
    worst case over all attacks, BPDA included) are measured or empty; ``link``, ``name``, ``authors`` and ``venue`` are
    the submitter's to fill in. ``unreliable`` is true where BPDA was not run: plain attacks over-report this defence.
    """
    from ..engine.outcomes import is_bpda

    results = evaluation["results"] if evaluation is not None else {}
    rows = {row["name"]: row for row in results.get("comparisons", [])}
    has_bpda = "worst case" in rows and any(is_bpda(name) for name in rows["worst case"]["attacks"])
    worst = _percent(rows.get("worst case"))
    return {
        "link": "",
        "name": "",
        "authors": "",
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": source.dataset,
        "threat": norm,
        "venue": "",
        "architecture": f"MeanSparse {_architecture(source)}",
        "eps": results.get("eps", ""),
        "clean_acc": _percent(rows.get("clean")),
        "reported": worst,
        "autoattack_acc": _percent(rows.get("autoattack")),
        "external": worst if has_bpda else "",
        "footnote": _footnote(source, checkpoint, evaluation, has_bpda=has_bpda),
        "unreliable": None if evaluation is None else not has_bpda,
    }


def save_card(path: Path, card: dict[str, Any]) -> None:
    """The card as JSON, atomically."""
    write_bytes(path, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


def n_test_images(source: ModelSource) -> int | None:
    """How many images a leaderboard figure is measured on; None for a data set without a leaderboard."""
    from .published import N_IMAGES

    return N_IMAGES.get(source.dataset)


def _footnote(source: ModelSource, checkpoint: Checkpoint, evaluation: dict[str, Any] | None, *, has_bpda: bool) -> str:
    operators = f"{len(checkpoint.active)} sites ({checkpoint.rule}) of {source.name}"
    if checkpoint.options_id():
        weights = "; alpha times a weight at each site" if checkpoint.site_weights else ""
        operators += f" (centre: {checkpoint.centre}; spread: {checkpoint.spread}{weights})"
    parts = [f"MeanSparse ({PAPER}), alpha {checkpoint.alpha:g}, at {operators}."]
    if evaluation is None:
        return " ".join([*parts, "Not evaluated."])
    results, settings = evaluation["results"], evaluation["config"]["settings"]
    rows = {row["name"]: row for row in results["comparisons"]}
    worst, total = rows["worst case"], n_test_images(source)
    n = f"{results['n_examples']:,}" + (f" of {total:,}" if total else "")
    data = f" of {Path(settings['dataset']).name}" if settings.get("dataset") not in (None, source.dataset) else ""
    parts.append(f"Measured on {n} test images{data} with {', '.join(worst['attacks'])}; an image counts as robust only if it withstood all.")  # fmt: skip
    if has_bpda:
        parts.append(
            "In attacks called bpda or soft, gradients pass straight through the operator, or through a soft edge."
        )
    else:
        parts.append("BPDA was not run, and plain attacks over-report this defence.")
    gain, error = 100 * worst["sparsified_minus_base"], 100 * worst["sparsified_minus_base_standard_error"]
    parts.append(
        f"The base on the same images and attacks: {100 * worst['base_accuracy']:.2f}% "
        f"(paired difference {gain:+.2f} +- {error:.2f} points; {results['verdict']})."
    )
    return " ".join(parts)


def _architecture(source: ModelSource) -> str:
    from .published import published_models

    keys = (source.name, source.dataset, source.threat)
    for model in published_models():
        if (model.name, model.dataset, model.threat) == keys:
            return model.architecture.removeprefix("MeanSparse ")
    return source.name


def _percent(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['sparsified_accuracy']:.2f}"


def _header(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {})["meansparse"])  # type: ignore[no-any-return]
