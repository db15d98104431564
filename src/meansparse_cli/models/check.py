"""Whether MeanSparse works on the networks of the zoo: sites, statistics, operator in and out, checkpoint.

They are built with random weights: nothing is downloaded, no GPU is needed. In a network fresh from its constructor
features may fade to nothing or explode on the way to the logits; ``settle`` sees to that first.
"""

import gc
import multiprocessing
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from ..data.facts import KNOWN_DATASETS
from ..foreign import first_line
from ..operator.active import backward_rule, set_alpha
from ..operator.calibration import calibrate_channels
from ..operator.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, sparsify
from ..operator.insertion import SparsifiedModel, remove
from ..operator.module import MeanSparse
from ..operator.observe import inputs_shown
from ..sites.find import Site, find_sites
from . import zoo
from .evidence import ChannelEvidence, channel_evidence
from .names import ZooEntry
from .published_sites import find_published_operators, take_out
from .robustbench import quietly

N_IMAGES, SEED = 2, 0

Row = dict[str, Any]
"""The entry's name, dataset and threat, what was found, the broken promises under ``problems``, and ``seconds``."""


def check_entry(entry: ZooEntry) -> Row:
    """One row of the report. Whatever goes wrong becomes one of the row's ``problems``."""
    started = time.monotonic()
    facts: dict[str, Any] = {}
    torch.manual_seed(SEED)
    shape = KNOWN_DATASETS[entry.dataset].image_shape
    images = torch.rand((N_IMAGES, *shape), generator=torch.Generator().manual_seed(SEED))
    # what these print and warn of is the architectures' own affair
    with quietly(), tempfile.TemporaryDirectory() as scratch:
        try:
            # as it is loaded, without weights; no name holds the network, so that it can go before the next one comes
            file = Path(scratch) / "meansparse.safetensors"
            facts, problems = check_model(take_out(zoo.build_zoo_model(entry)), images, file)
        except Exception as error:  # the architectures are other people's code
            problems = [f"{type(error).__name__}: {first_line(error)}"]
    gc.collect()
    return asdict(entry) | facts | {"problems": problems, "seconds": round(time.monotonic() - started, 1)}


def check_entries(entries: Sequence[ZooEntry], n_jobs: int) -> Iterator[tuple[Row, float]]:
    """Rows as they are done, each with the peak memory so far in GiB: that of all processes, each at its own peak."""
    if n_jobs == 1:
        for entry in entries:
            yield check_entry(entry), _peak_rss_gib()
        return
    n_threads = max(1, (os.cpu_count() or 1) // n_jobs)
    peaks: dict[int, float] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_jobs, context, initializer=torch.set_num_threads, initargs=(n_threads,)) as workers:
        pending = [workers.submit(_check_in_worker, entry) for entry in entries]
        try:
            for done in as_completed(pending):
                row, process, peak = done.result()
                peaks[process] = peak
                yield row, sum(peaks.values()) + _peak_rss_gib()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _check_in_worker(entry: ZooEntry) -> tuple[Row, int, float]:
    return check_entry(entry), os.getpid(), _peak_rss_gib()


def _peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


ALPHA = 0.2
"""The paper's usual alpha, used wherever the operator is to act."""


def settle(model: nn.Module, images: Tensor) -> list[str]:
    """Give a network with random weights features of the scale that training gives it; one forward pass.

    Weights that start at zero (or a layer scale at 1e-6), so that their branch starts as nothing, get ordinary values;
    every batch norm's running statistics become those of its input, layer after layer. Returns the parameters that the
    network itself rewrites as it runs (Pang2020Boosting normalises its last layer in every pass).
    """

    def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return
        if module.running_mean is not None and module.running_var is not None:
            x = args[0].detach().transpose(0, 1).flatten(1)
            variance = x.var(1, correction=0)
            module.running_mean.copy_(x.mean(1))
            module.running_var.copy_(variance.clamp_min(0.1 * float(variance.mean()) + 1e-6))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # a single number is the setting of an activation (PSSiLU's beta), not the weight of a branch
            if parameter.numel() > 1 and not name.endswith("bias") and float(parameter.abs().max()) < 1e-3:
                if parameter.ndim > 1 and parameter.shape[1:].numel() > 1:
                    parameter.normal_(0, parameter.shape[1:].numel() ** -0.5)
                else:
                    parameter.fill_(1.0)
        written = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
        with nn.modules.module.register_module_forward_pre_hook(measure):
            model(images)
    return [name for name, p in model.named_parameters() if written[name] != (p.data_ptr(), p._version)]


def check_model(model: nn.Module, images: Tensor, checkpoint_file: Path) -> tuple[dict[str, Any], list[str]]:
    """What was found in ``model``, and every promise that it breaks (none: it passed).

    ``images`` (batch, channels, height, width), at least two and different. ``checkpoint_file`` is written and read.
    The model must be in eval mode; its weights are changed (``settle``). Gates are sites here too, and so are the
    places of published operators. Raises what the model's own code raises.
    """
    rewritten = settle(model, images)
    values = {name: model.get_parameter(name).detach().clone() for name in rewritten}

    def put_back(module: nn.Module, args: Any) -> None:
        # before every pass: bit-equal needs equal weights
        for name, value in values.items():
            module.get_parameter(name).data = value.clone()

    with model.register_forward_pre_hook(put_back):
        facts, problems = _check(model, images, checkpoint_file)
    return facts | ({"rewrites": rewritten} if rewritten else {}), problems


def _check(model: nn.Module, images: Tensor, checkpoint_file: Path) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    keys_before, hooks_before = list(model.state_dict()), _n_hooks(model)
    passes: list[Tensor] = []
    with model.register_forward_hook(lambda module, args, output: passes.append(output.detach())):
        sites = find_sites(model, images)
    base = passes[0]  # of its first pass, which is on these very images
    places = find_published_operators(model, images)
    sites += [replace(place, index=len(sites) + i) for i, place in enumerate(places)]
    if not bool(torch.isfinite(base).all()) or _distance(base[0], base[1]) <= 1e-5 * float(base.abs().max()):
        problems.append("features: the network does not tell two images apart, or its logits are not finite")

    data = TensorDataset(images, torch.zeros(len(images), dtype=torch.long))
    examples = cast("Subset[tuple[Tensor, int]]", Subset(data, range(len(images))))
    statistics = calibrate_channels(model, sites, examples, batch_size=len(images))
    checkpoint = Checkpoint(tuple(sites), tuple(statistics), "pooled", ALPHA)

    sparsified = sparsify(model, checkpoint, alpha=0.0)
    with _watched(sparsified, _statistics_problem) as found:
        off = _logits(sparsified, images)
    problems += [f"statistics: {problem}" for problem in found.values() if problem]
    problems += [f"statistics: no tensor came by {site.name}" for site in sites if site.index not in found]
    if not torch.equal(off, base):
        problems.append(f"alpha 0: logits differ by up to {_distance(off, base):.3g}")

    set_alpha(sparsified, ALPHA)
    with _watched(sparsified, lambda x, site, operator: channel_evidence(x)) as evidence:
        on, gradient = _logits_and_gradient(sparsified, images)
    problems += [f"channel axis: {problem}" for site in sites if (problem := _evidence_problem(site, evidence))]
    if torch.equal(on, base):
        problems.append(f"alpha {ALPHA}: the output did not change")
    problems += _removal_problems(sparsified, model, images, base, keys_before, hooks_before)
    save_checkpoint(checkpoint_file, checkpoint)
    again = sparsify(model, load_checkpoint(checkpoint_file))
    with backward_rule(again, "identity"):  # its forward pass is the same: one pass answers two questions
        loaded, gradient_through = _logits_and_gradient(again, images)
    if not torch.equal(loaded, on):
        problems.append(f"save and load: logits differ by up to {_distance(loaded, on):.3g}")
    for what, values in (("plain", gradient), ("straight-through", gradient_through)):
        if not bool(torch.isfinite(values).all()) or not bool(values.any()):
            problems.append(f"gradients: the {what} gradient is zero everywhere, or not finite")
    remove(again)

    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "n_sites": sum(not site.gate for site in sites) - len(places),
        "n_gates": sum(site.gate for site in sites),
        "n_confirmed": sum(evidence.get(site.index) is not None for site in sites),
        "operations": dict(Counter(f"{s.operation}{'()' if s.kind == 'function' else ''}" for s in sites)),
        "layouts": dict(Counter(site.layout for site in sites)),
    }
    return facts, problems


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(images))


def _logits_and_gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient by the images of a fixed random mixture of them."""
    x = images.clone().requires_grad_()
    logits: Tensor = model(x)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((logits * direction).sum(), x)
    return logits.detach(), gradient


@contextmanager
def _watched(model: SparsifiedModel, look: Any) -> Iterator[dict[int, Any]]:
    """What ``look(tensor, site, operator)`` makes of each site's tensor during the next forward pass, by site index."""
    seen: dict[int, Any] = {}
    site_of = {model.at(site): site for site in model.sites}

    def see(operator: MeanSparse, x: Tensor) -> None:
        seen[site_of[operator].index] = look(x, site_of[operator], operator)

    with inputs_shown(model, see):
        yield seen


def _statistics_problem(x: Tensor, site: Site, operator: MeanSparse) -> str | None:
    """Whether the operator holds the mean and deviation of ``x``, the tensor that really came by at alpha 0."""
    axis, shape = operator.channel_axis, tuple(x.shape)
    if operator.mean.shape != (shape[axis],) or operator.std.shape != operator.mean.shape:
        return f"{site.name} has {len(operator.mean)} channels, its input {shape} has {shape[axis]} on axis {axis}"
    rows = x.detach().double().movedim(axis, 0).flatten(1)
    std, mean = torch.std_mean(rows, 1, correction=0)
    scale = float(rows.abs().max()) + 1e-12
    if max(_distance(mean, operator.mean), _distance(std, operator.std)) > 1e-5 * scale:
        return f"{site.name}: mean or deviation are not those of its input"
    return None


def _evidence_problem(site: Site, evidence: dict[int, ChannelEvidence | None]) -> str | None:
    found = evidence.get(site.index)
    if found is None or (found.axis, found.channels) == (site.channel_axis, site.channels):
        return None
    return (
        f"{site.name}: {site.channels} channels on axis {site.channel_axis}, "
        f"but {found.made_by} gave {found.channels} on axis {found.axis}"
    )


def _removal_problems(
    sparsified: SparsifiedModel, model: nn.Module, images: Tensor, base: Tensor, keys: Sequence[str], n_hooks: int
) -> list[str]:
    problems = []
    if remove(sparsified) is not model:
        problems.append("remove: another object came back")
    if not torch.equal(after := _logits(model, images), base):
        problems.append(f"remove: logits differ by up to {_distance(after, base):.3g}")
    if list(model.state_dict()) != list(keys):
        problems.append(f"remove: left in the state dict: {sorted(set(model.state_dict()) ^ set(keys))[:3]}")
    if _n_hooks(model) != n_hooks:
        problems.append(f"remove: {_n_hooks(model) - n_hooks} hooks are left")
    return problems


def _n_hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
