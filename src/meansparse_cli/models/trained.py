"""Networks of our own, embedded or written by ``meansparse train``: the header says how they are built."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..errors import CheckpointError
from ..foreign import reading
from .fitting import fit_weights
from .kind import ModelKind
from .names import EMBEDDED, ModelSource, WeightFile
from .networks import ResNet18
from .weights import read_checkpoint

TRAIN_AGAIN = "make it again: meansparse train"


class EmbeddedModel(ModelKind):
    """A name in ``EMBEDDED``, or ``FILE.safetensors``."""

    kind = "embedded"
    names = rf"{'|'.join(EMBEDDED)}|.*\.safetensors"

    @classmethod
    def resolve(cls, name: str, dataset: str | None, threat: str) -> ModelSource:
        trained_on = EMBEDDED.get(name) or _read_header(Path(name)).get("dataset")
        return super().resolve(name, trained_on or dataset, threat)

    @property
    def file(self) -> Path:
        """Raises CheckpointError if the installation lacks the embedded weights."""
        name = self.source.name
        if name not in EMBEDDED:
            return Path(name)
        path = Path(str(resources.files(__package__) / "weights" / f"{name}.safetensors"))
        if not path.is_file():
            raise CheckpointError(
                f"this installation has no weights for {name} (expected {path})",
                hint="install the package again, or train the model: meansparse train --help",
            )
        return path

    def weights(self) -> tuple[WeightFile, ...]:
        name = self.source.name
        return (WeightFile(self.file.name, f"embedded:{name}" if name in EMBEDDED else name, path=self.file),)

    def path_now(self, path: Path, origin: str) -> Path:
        """The file of the installed package, wherever it lay at the time."""
        return self.file.resolve() if origin == f"embedded:{self.source.name}" else path

    def build(self, *, published_sites: bool = False, settings: dict[str, Any] | None = None) -> nn.Module:
        return ResNet18(**settings or {})

    def network_settings(self, weights: Sequence[Path]) -> dict[str, Any]:
        return json.loads(_read_header(weights[0] if weights else self.file)["network"])  # type: ignore[no-any-return]

    def training(self) -> dict[str, Any]:
        header = _read_header(self.file)
        # the shipped models are of before that was written down; both were trained by PGD
        training = json.loads(header["training"]) if "training" in header else {"method": "pgd"}
        return {**training, **json.loads(header.get("network", "{}"))}

    def _load(self, paths: Sequence[Path], allow_pickle: bool, published_sites: bool) -> nn.Module:
        path = paths[0]
        if "network" not in _read_header(path):
            hint = "expected a file that `meansparse train` wrote"
            raise CheckpointError(f"{path} does not say which network it is for", hint=hint)
        with reading(CheckpointError, f"{path}: its header describes no network", TRAIN_AGAIN):
            network = self.build(settings=self.network_settings(paths))
        what = f"{path.name} as {self.source.name}"
        fit_weights(network, read_checkpoint(path), what=what, mend=TRAIN_AGAIN, key=self.weights_key)
        return network


def _read_header(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise CheckpointError(f"no file {path}", hint="name a file that `meansparse train` wrote")
    with (
        reading(CheckpointError, f"{path} is not a whole safetensors file", TRAIN_AGAIN),
        safe_open(path, framework="pt") as tensors,
    ):
        return dict(tensors.metadata() or {})
