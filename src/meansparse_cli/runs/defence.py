"""A defence that ``evaluate`` is given by name, in the place of MeanSparse operators: any modules, or a whole model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..errors import ConfigError
from ..files import sha256_of
from ..foreign import reading
from ..models.factory import code_of, import_named
from ..models.source import kind_of
from ..operator.defence import OWN, SOFT, DefendedModel, Surrogate, defend
from ..settings.stages import OPERATOR_OPTIONS, EvaluateConfig, StageConfig
from .context import RunContext
from .report import RunPaths

ALPHA = 1.0
"""At which a defence is on."""
DEFENCE_WORDS = ("defence", "as a defence")
"""What the words for it begin with: with modules named, and without."""
IDENTITY, OF_ITSELF = "identity", {"own": OWN, "soft": SOFT}


@dataclass(frozen=True)
class NamedDefence:
    """Modules by patterns of their names, or the model itself beside ``base``.

    ``texts``: as typed, PATTERN or PATTERN=SURROGATE. ``base``: the model without the defence; None: the same model
    with these modules off. ``inputs``: what tells surrogates and base from others of their names.
    """

    texts: tuple[str, ...]
    surrogates: Mapping[str, Surrogate | None]
    base: nn.Module | None
    base_name: str
    n_draws: int
    inputs: dict[str, str]

    rule = "all"

    def applied(self, model: nn.Module, alpha: float) -> DefendedModel:
        """``model`` with this defence, on at ``alpha`` 1."""
        return defend(model, self.surrogates, base=self.base, n_draws=self.n_draws)

    def in_words(self, alpha: float) -> str:
        words = f"{DEFENCE_WORDS[0]} {', '.join(self.texts)}" if self.texts else DEFENCE_WORDS[1]
        if self.base is not None:
            words += f" beside {self.base_name}"
        return words if self.n_draws == 1 else f"{words}, {self.n_draws} draws"

    def site_alphas(self, alpha: float) -> dict[str, float]:
        return dict.fromkeys(self.texts, alpha)

    def options_id(self) -> str:
        """All that the outcomes depend on, the model apart."""
        return repr((self.texts, self.n_draws, self.inputs))


def defence_of(context: RunContext[EvaluateConfig]) -> NamedDefence | None:
    """The defence that the settings name, its code imported; None where they name none."""
    config = context.config
    if not config.defence and config.base is None:
        if config.draws is not None:
            raise ConfigError("--draws is about a defence", hint="name its modules: --defence PATTERN")
        return None
    for option in ("alpha", *OPERATOR_OPTIONS):
        if context.sources.get(option, "default") != "default":
            raise ConfigError(f"--{option} is about MeanSparse, not about a defence of other modules")
    surrogates, inputs = dict[str, Surrogate | None](), dict[str, str]()
    for text in config.defence or ():
        pattern, _, name = text.partition("=")
        surrogates[pattern] = _surrogate(name)
        if ":" in name:
            inputs[f"surrogate {name}"] = _digest(name)
    base, base_name = _base(context, inputs)
    return NamedDefence(config.defence or (), surrogates, base, base_name, config.draws or 1, inputs)


def _surrogate(name: str) -> Surrogate | None:
    if name in ("", IDENTITY):
        return None
    if name in OF_ITSELF:
        return OF_ITSELF[name]
    if ":" not in name:
        hint = f"expected {IDENTITY}, own or soft (the module's own gradient, or its slope across a narrow band), or "
        hint += "module:function, file.py:function"
        raise ConfigError(f"no surrogate {name!r}", hint=hint)
    found = import_named(name)
    if isinstance(found, type):  # a module that takes no arguments
        with reading(ConfigError, f"the surrogate {name} cannot be made without arguments"):
            found = found()
    if not callable(found):
        raise ConfigError(f"the surrogate {name} is a {type(found).__name__}; expected a function of a module's input")
    return found  # type: ignore[no-any-return]


def _digest(name: str) -> str:
    """Of the file that holds a surrogate or a network: outcomes of another one are not taken for its own."""
    place = (code_of(name) or "").rpartition(":")[0].partition(" ")[0]
    return sha256_of(Path(place)) if Path(place).is_file() else place


def _base(context: RunContext[EvaluateConfig], inputs: dict[str, str]) -> tuple[nn.Module | None, str]:
    """The model that ``--base`` names, from a run folder or by its name, once it was fetched; noted in ``inputs``."""
    config = context.config
    if config.base is None:
        return None, ""
    source = context.run.source
    of_name = {"model": config.base, "dataset": source.dataset, "threat": source.threat}
    which = {"run": config.base} if RunPaths(Path(config.base)).report("fetch").exists() else of_name
    allowed = {key: getattr(config, key) for key in ("allow_code", "allow_pickle", "device")}
    other = RunContext("base", StageConfig.model_validate(which | allowed))
    other.verified("fetch")
    code = f" {_digest(other.run.source.name)}" if kind_of(other.run.source).names_code else ""
    inputs["base"] = f"{other.run.source.name} {other.weights_id}{code}"
    return other.base(), other.run.source.name
