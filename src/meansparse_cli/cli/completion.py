"""What TAB offers behind an option, once ``meansparse --install-completion`` was typed."""

from collections.abc import Callable, Iterable

from ..attacks.catalogue import ATTACKS, PRESETS
from ..models.names import EMBEDDED, package_data
from ..settings.resolve import shipped_configs


def _offer(known: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: sorted(name for name in set(known()) if name.startswith(incomplete))


COMPLETIONS: dict[str, Callable[[str], list[str]]] = {
    "attack": _offer(lambda: [*PRESETS, *ATTACKS]),
    "model": _offer(lambda: [*EMBEDDED, *package_data("zoo.yaml")["headline"], "timm:", "torchvision:"]),
    "config": _offer(shipped_configs),
}
"""By the name of the setting."""
