"""Golden folders: taken to another place with their reports sealed again, and compared with new ones."""

import base64
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from threadpoolctl import threadpool_info

PLACEHOLDER = "package/digits.safetensors"
"""In committed reports, instead of the place of the embedded weights."""

SHOWN = "sweep-alpha.svg"
"""The one figure that is kept though no report seals it: a page shows it."""

NOT_KEPT = (".lock", "begun*.json", "__pycache__", "colours.npz", "few.npz", "networks.py")
"""Not in a golden folder: locks, when and where a shard began, and what the test puts there itself."""

VOLATILE = {"provenance", "content_sha256", "seconds", "path"}
"""Keys of a report that differ between equal runs; and so does the sha256 of a report that is the input of another."""

TEXT = (".yaml", ".json", ".md", ".html", ".txt")
TRAINED = "model.safetensors"
SHARE_THAT_MAY_DIFFER = 0.1
"""Of the outcomes, on another machine or with another torch."""


def this_machine() -> dict[str, str]:
    """What the bytes of a result depend on, as far as is known."""
    packages = ("torch", "numpy", "matplotlib")
    return {name: importlib.metadata.version(name) for name in packages} | {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "blas": _kernels_of_numpy(),
    }


def _kernels_of_numpy() -> str:
    """By the processor, whatever torch takes: OPENBLAS_CORETYPE=SkylakeX asks for those that the golden runs had."""
    return ", ".join(sorted({lib["architecture"] for lib in threadpool_info() if lib["internal_api"] == "openblas"}))


# ---- to another place


def seal_again(folder: Path, old: str, new: str) -> None:
    """Replace ``old`` by ``new`` in the reports of ``folder``, with every hash that hangs on it: of a report's own
    content, of a report in the one after it, and in the pages about them.
    """
    texts = {path: path.read_text() for path in folder.rglob("*") if path.suffix in TEXT}
    reports = {path: text for path, text in texts.items() if "content_sha256: " in text and path.suffix == ".yaml"}
    swaps, n_before = {old: new}, 0
    while len(swaps) != n_before:  # each pass seals the reports that hang on those of the pass before
        n_before = len(swaps)
        for text in reports.values():
            now = _swapped(text, swaps)
            content = yaml.safe_load(now)
            sealed, seal = content.pop("content_sha256"), _content_hash(content)
            if sealed != seal:
                was = yaml.safe_load(text)["content_sha256"]
                swaps[was] = seal
            now = _swapped(text, swaps)
            if now != text:
                swaps[_sha256(text.encode())] = _sha256(now.encode())
    for path, text in texts.items():
        if (now := _swapped(text, swaps)) != text:
            path.write_text(now)


def _swapped(text: str, swaps: dict[str, str]) -> str:
    for old, new in swaps.items():
        text = text.replace(old, new)
    return text


def _content_hash(body: dict[str, Any]) -> str:
    return _sha256(json.dumps(body, sort_keys=True, default=str).encode())


def sha256_of(file: Path) -> str:
    """Hex digest of a file."""
    return _sha256(file.read_bytes())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- compared


def differences(golden: Path, new: Path, *, exactly: bool) -> list[str]:
    """How the file ``new`` differs from ``golden`` in more than what differs between equal runs; nothing: not at all.

    ``exactly``: to the byte; else as results of another machine may, floats by 1e-5 (trained weights by 1e-3) and a few
    outcomes.
    """
    if golden.suffix in (".yaml", ".json"):
        a, b = (steady(yaml.safe_load(path.read_text())) for path in (golden, new))
        return list(unlike(a, b, "")) if exactly else list(unlike(shape_of(a), shape_of(b), ""))
    if golden.suffix in TEXT:
        texts = [steady_text(path.read_text()) for path in (golden, new)]
        lines = [text.splitlines() if exactly else [_without_numbers(s) for s in text.splitlines()] for text in texts]
        share = 0.0 if exactly else SHARE_THAT_MAY_DIFFER
        return _unlike_lines(*lines, share=share)
    if exactly:
        return [] if golden.read_bytes() == new.read_bytes() else ["other bytes"]
    if golden.suffix == ".npz":
        return _unlike_outcomes(golden, new)
    if golden.suffix == ".safetensors":
        return _unlike_tensors(golden, new)
    return []


def steady(value: Any) -> Any:
    """A report without what differs between equal runs."""
    if isinstance(value, dict):
        kept = {key: steady(entry) for key, entry in value.items() if key not in VOLATILE}
        if isinstance(inputs := kept.get("inputs"), dict):
            kept["inputs"] = {key: "" if str(key).endswith(".yaml") else entry for key, entry in inputs.items()}
        return kept
    return [steady(entry) for entry in value] if isinstance(value, list) else value


def steady_text(text: str) -> str:
    """A page without its times, machine and versions, and with each figure's sha256 in its place."""
    text = re.sub(r"sha256 of its content [0-9a-f]{64}, [0-9TZ:-]{20}", "sha256 of its content", text)
    text = re.sub(r"(`?versions:? ?`?|<dt[^>]*>versions</dt><dd>)[^`<\n]*", r"\1", text)
    text = re.sub(r"(machine: `|<dt[^>]*>machine</dt><dd>)[^`<\n]*", r"\1", text)
    text = re.sub(r"^Measured on .*$", "Measured", text, flags=re.MULTILINE)
    return without_figures(text)


def without_figures(text: str) -> str:
    """A page with the sha256 of each embedded figure in its place."""
    return re.sub(
        r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", lambda m: f"svg {_sha256(base64.b64decode(m[1]))}", text
    )


def unlike(a: Any, b: Any, where: str) -> Any:
    """Where two values of YAML differ, as ``key.key: this, that``."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                yield f"{where}.{key}: only in the {'new' if key in b else 'golden'} one"
            else:
                yield from unlike(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from unlike(*pair, f"{where}[{i}]")
    elif a != b or type(a) is not type(b):
        yield f"{where}: {a!r}, {b!r}"


def shape_of(value: Any) -> Any:
    """The keys of a report, to any depth, of lists those of the first entry: what no machine changes."""
    if isinstance(value, dict):
        return {key: shape_of(entry) for key, entry in value.items() if key not in ("site_alphas", "outputs")}
    return [shape_of(entry) for entry in value[:1]] if isinstance(value, list) else None


def _without_numbers(line: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[+-]?\d[\d.,]*", "#", line))


def _unlike_lines(a: list[str], b: list[str], *, share: float) -> list[str]:
    if len(a) != len(b):
        return [f"{len(a)} lines, {len(b)} lines"]
    found = [f"line {i}: {x!r}, {y!r}" for i, (x, y) in enumerate(zip(a, b, strict=True), start=1) if x != y]
    return found if len(found) > share * len(a) else []


def _unlike_outcomes(golden: Path, new: Path) -> list[str]:
    found = []
    with np.load(golden) as a, np.load(new) as b:
        if a.files != b.files:
            return [f"{a.files}, {b.files}"]
        for key in a.files:
            if a[key].shape != b[key].shape or a[key].dtype != b[key].dtype:
                found.append(f"{key}: {a[key].dtype} {a[key].shape}, {b[key].dtype} {b[key].shape}")
            elif (n := int((a[key] != b[key]).sum())) > SHARE_THAT_MAY_DIFFER * a[key].size:
                found.append(f"{key}: {n} of {a[key].size} differ")
    return found


def _unlike_tensors(golden: Path, new: Path) -> list[str]:
    a, b = load_file(golden), load_file(new)
    if a.keys() != b.keys():
        return [f"{sorted(a)}, {sorted(b)}"]
    if "witnesses" in golden.name:
        return []  # which image breaks an example is chance
    # a training carries each rounding into all steps that follow
    close = 1e-3 if golden.name == TRAINED else 1e-5
    return [key for key in a if not torch.allclose(a[key].double(), b[key].double(), rtol=close, atol=close)]
